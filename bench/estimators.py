"""How much the encoder's gradient varies under each estimator, over latent sizes: ``python -m bench.estimators``.

For each size a VAE learns scikit-learn's digits with the reparameterized estimator. Then, with its weights as they are,
the gradient of E_q[-log p(x|z)] with respect to the parameters of each digit's posterior is drawn many times under
each estimator. They have the same mean; what differs is the variance around it.
"""

import argparse
import csv
import sys
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bench.tables import RESULTS
from fastvae.models import VAE
from fastvae.nn import MLPDecoder, MLPEncoder

LATENT_DIMS = (1, 2, 4, 8, 16, 32, 64)
ESTIMATORS = ("reparameterized", "score_function_baseline", "score_function")
NAME = "estimator_variance"


class Given(nn.Module):
    """An encoder whose features are parameters, one row for each datum of a batch."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = nn.Parameter(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.features


def given_posterior(parameters: Tensor, decoder: nn.Module, latent_dim: int, **settings: Any) -> VAE:
    """Return a VAE whose posteriors have the given parameters, (data, parameters of the head)."""
    model = VAE(Given(parameters), decoder, latent_dim, features=parameters.size(1), **settings)
    with torch.no_grad():
        model.head.linear.weight.copy_(torch.eye(parameters.size(1)))
        model.head.linear.bias.zero_()
    return model


def gradients(model: VAE, x: Tensor, seed: int) -> Tensor:
    """Draw z once for each datum; return each one's gradient with respect to its posterior's parameters."""
    loss = model(x, kl_weight=0.0, seed=torch.tensor([seed])).loss
    (grad,) = torch.autograd.grad(loss, model.encoder.features)  # type: ignore[arg-type]
    return grad * len(x)


def measure(latent_dim: int, *, data: int, draws: int, epochs: int, seed: int = 0) -> list[dict[str, Any]]:
    """Train at one latent size and return a row for each estimator.

    Args:
        latent_dim: size of z.
        data: how many digits to draw gradients for.
        draws: gradients of each.
        epochs: of training.
        seed: of everything.
    """
    torch.manual_seed(seed)
    x = torch.tensor(load_digits().data / 16, dtype=torch.float32)
    model = VAE(MLPEncoder((64,), (128,)), MLPDecoder(latent_dim, (64,), (128,)), latent_dim, likelihood="bernoulli")
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in x[torch.randperm(len(x))].split(128):
            optimizer.zero_grad()
            model(batch).loss.backward()
            optimizer.step()
    x = x[torch.randperm(len(x))[:data]]
    with torch.no_grad():
        parameters = torch.cat(model.encode(x), 1)
    rows = []
    for estimator in ESTIMATORS:
        given = given_posterior(parameters, model.decoder, latent_dim, likelihood="bernoulli", estimator=estimator)
        for step in range(100):  # the running mean comes to rest
            given(x, seed=torch.tensor([-1 - step]))
        given.eval()
        drawn = torch.stack([gradients(given, x, draw) for draw in range(draws)]).double()
        rows.append(
            {
                "latent_dim": latent_dim,
                "estimator": estimator,
                "variance": drawn.var(0).sum(1).mean().item(),
                "squared_mean": drawn.mean(0).square().sum(1).mean().item(),
                "data": data,
                "draws": draws,
                "epochs": epochs,
                "torch": torch.__version__,
            }
        )
    for row in rows:
        row["times_reparameterized"] = row["variance"] / rows[0]["variance"]
    return [{name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in row.items()} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    """Return the variances as Markdown, a latent size a line."""
    lines = [
        f"| latent dimensions | {' | '.join(e.replace('_', ' ') for e in ESTIMATORS)} |",
        "|--:|" + "--:|" * len(ESTIMATORS),
    ]
    for latent_dim in dict.fromkeys(row["latent_dim"] for row in rows):
        cells = [
            f"{_number(row['variance'])} ({_number(row['times_reparameterized'])}x)"
            for row in rows
            if row["latent_dim"] == latent_dim
        ]
        lines.append(f"| {latent_dim} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the variances over the latent sizes, both axes logarithmic."""
    matplotlib.use("agg")
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for estimator, marker in zip(ESTIMATORS, "osD", strict=True):
        points = [(row["latent_dim"], row["variance"]) for row in rows if row["estimator"] == estimator]
        axes.plot(*zip(*points, strict=True), marker=marker, label=estimator.replace("_", " "))
    axes.set(xscale="log", yscale="log", xlabel="latent dimensions", ylabel="variance of a datum's gradient, nats$^2$")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xticks([row["latent_dim"] for row in rows[:: len(ESTIMATORS)]], minor=False)
    axes.minorticks_off()
    axes.set_title("Gradient of E$_q$[-log p(x|z)] for the posterior's parameters, digits, one sample", fontsize=9)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.estimators", description=__doc__)
    parser.add_argument("--latent", type=int, nargs="+", default=LATENT_DIMS, metavar="SIZE", help="latent sizes")
    parser.add_argument("--data", type=int, default=200, help="digits [200]")
    parser.add_argument("--draws", type=int, default=500, help="gradients of each digit [500]")
    parser.add_argument("--epochs", type=int, default=40, help="of training [40]")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results [bench/results]")
    arguments = parser.parse_args()
    rows = []
    for latent_dim in arguments.latent:
        rows += measure(latent_dim, data=arguments.data, draws=arguments.draws, epochs=arguments.epochs)
        print(table(rows).splitlines()[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with (arguments.out / f"{NAME}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (arguments.out / f"{NAME}.md").write_text(f"# Variance of gradient estimators\n\n{table(rows)}\n")
    draw(rows, arguments.out / f"{NAME}.png")
    print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
