"""Answers by latent action: what to say is a code of a frozen `MixtureVAE`, how to say it depends on what was said."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from fastvae.models.evidence import evaluating
from fastvae.models.mixture_vae import MixtureVAE
from fastvae.models.pretrained import Pretrained
from fastvae.nn import LSTMDecoder, LSTMEncoder
from fastvae.nn.sentences import checked_lengths


class DialogueOutput(NamedTuple):
    """Losses of a batch, in nats.

    Attributes:
        loss: scalar to minimise, nats per answer: the means of nll and policy_nll.
        nll: -log p(x|context, c) of each answer, with c of q(c|x), `(batch,)`.
        policy_nll: cross-entropy of the policy with q(c|x), summed over the codes, `(batch,)`.
        codes: c, int64 `(batch, variables)`.
        tokens: predicted tokens of each answer, `</s>` counted and `<s>` not, int64 `(batch,)`.
    """

    loss: Tensor
    nll: Tensor
    policy_nll: Tensor
    codes: Tensor
    tokens: Tensor


class DialogueModel(Pretrained):
    """Context encoder, policy over the codes of a `MixtureVAE`, and a decoder that sees both.

    The VAE reads an answer x and gives q(c|x); it does not learn any more. The policy learns to foresee these codes
    from the context, the decoder to write x from the context and the mean of p(z|c). So an answer can be asked for by
    its code, whatever the policy says.

    `config` holds the constructor's arguments: `DialogueModel(**model.config)` builds the same model; `over` builds one
    on a given VAE.

    Args:
        vocab_size: number of tokens V.
        vae: the other arguments of the `MixtureVAE`'s constructor.
        embed_dim: size of the word embeddings.
        hidden_size: size of the context's and the decoder's state.
        num_layers: LSTM layers of context encoder and decoder each.
        word_dropout: share of the decoder's input words replaced by `<unk>` in training.
        dropout: share of the states dropped in training.
        share_embedding: context encoder and decoder use the same embedding.

    Raises:
        ValueError: the VAE has no codes.

    Source: Shi et al., Dispersed Exponential Family Mixture VAEs for Interpretable Text Generation (2020), section 4.4;
    the policy over the codes of a frozen model is of Zhao et al., Unsupervised Discrete Sentence Representation
    Learning (2018), section 3.4.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        vae: dict[str, Any],
        embed_dim: int = 256,
        hidden_size: int = 256,
        num_layers: int = 1,
        word_dropout: float = 0.0,
        dropout: float = 0.0,
        share_embedding: bool = False,
    ) -> None:
        super().__init__()
        self.vae = MixtureVAE(vocab_size, **vae).requires_grad_(False).eval()
        if self.vae.components == 1 or self.vae.prior == "none":
            raise ValueError("vae: expected a model with codes, got one with components=1")
        self.config: dict[str, Any] = {
            "vocab_size": vocab_size,
            "vae": {name: value for name, value in self.vae.config.items() if name != "vocab_size"},
            "embed_dim": embed_dim,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "word_dropout": word_dropout,
            "dropout": dropout,
            "share_embedding": share_embedding,
        }
        words = self.vae.decoder
        self.policy = nn.Linear(hidden_size, self.vae.variables * self.vae.components)
        self.decoder = LSTMDecoder(
            vocab_size,
            embed_dim,
            hidden_size,
            hidden_size + words.latent_dim,
            num_layers=num_layers,
            word_dropout=word_dropout,
            dropout=dropout,
            pad_index=words.pad_index,
            bos_index=words.bos_index,
            eos_index=words.eos_index,
            unk_index=words.unk_index,
        )
        self.context_encoder = LSTMEncoder(
            vocab_size,
            embed_dim,
            hidden_size,
            num_layers=num_layers,
            dropout=dropout,
            pad_index=words.pad_index,
            embedding=self.decoder.embedding if share_embedding else None,
        )

    @classmethod
    def over(cls, vae: MixtureVAE, **settings: Any) -> DialogueModel:
        """Build an untrained model on a copy of a trained VAE.

        Args:
            vae: gives the codes.
            settings: further arguments of the constructor.
        """
        arguments = dict(vae.config)
        model = cls(arguments.pop("vocab_size"), vae=arguments, **settings)
        model.vae.load_state_dict(vae.state_dict())
        return model

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all but the VAE, which only ever reads."""
        super().train(mode)
        self.vae.eval()
        return self

    def forward(
        self,
        tokens: Tensor,
        context: Tensor,
        lengths: Tensor | None = None,
        context_lengths: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        seed: Tensor | None = None,
    ) -> DialogueOutput:
        """Losses of answers; in training c is drawn from q(c|x), in evaluation it is the likeliest.

        Args:
            tokens: answers, `(batch, time)` int64, each row `<s> ... </s>`, padded on the right.
            context: what was said before, likewise, the utterances one after the other.
            lengths, context_lengths: `(batch,)` int64; None counts the tokens that are not padding.
            generator: source of the codes and of word dropout; the global generator when None.
            seed: int64 tensor of shape (1,) that fixes the word dropout, in place of `generator`.

        Raises:
            TypeError, ValueError, IndexError: as `LSTMDecoder.forward`.
        """
        lengths = checked_lengths(tokens, lengths, self.decoder.pad_index, shortest=2)
        with torch.no_grad():
            q = self.vae.encode(tokens, lengths).logits.float().softmax(-1)
            codes = q.argmax(-1)
            if self.training:
                codes = torch.multinomial(q.flatten(0, 1), 1, generator=generator).view(codes.shape)
            action = self.vae.code_mean(codes)
        state = self._state(context, context_lengths)
        policy_nll = -(q * self._policy(state)).sum((1, 2))
        latent = torch.cat([state, action.to(state.dtype)], -1)
        nll = self.decoder(tokens, latent, lengths, generator=generator, seed=seed)
        return DialogueOutput(nll.mean() + policy_nll.mean(), nll, policy_nll, codes, lengths - 1)

    @torch.no_grad()
    def actions(self, context: Tensor, context_lengths: Tensor | None = None, *, n: int = 1) -> tuple[Tensor, Tensor]:
        """Give the likeliest actions, one value for each code.

        Args:
            context, context_lengths: as in `forward`.
            n: how many, from 1 to the number that there are.

        Returns:
            codes `(batch, n, variables)` int64, the likeliest first, and the log of their probability `(batch, n)`.

        Raises:
            ValueError: there are not as many.
        """
        variables, components = self.vae.variables, self.vae.components
        if not 1 <= n <= components**variables:
            raise ValueError(f"n: expected 1 to {components**variables} actions, got {n}")
        log_p = self.code_log_probabilities(context, context_lengths)
        codes = torch.zeros(len(context), 1, 0, dtype=torch.int64, device=context.device)
        scores = log_p.new_zeros(len(context), 1)
        for variable in range(variables):  # codes are independent: the best n of some begin the best n of more
            joint = scores.unsqueeze(2) + log_p[:, variable].unsqueeze(1)
            scores, best = joint.flatten(1).topk(min(n, joint[0].numel()))
            earlier = codes.gather(1, (best // components).unsqueeze(2).expand(-1, -1, variable))
            codes = torch.cat([earlier, (best % components).unsqueeze(2)], 2)
        return codes, scores

    @torch.no_grad()
    def code_log_probabilities(self, context: Tensor, context_lengths: Tensor | None = None) -> Tensor:
        """Give the log of the policy's probabilities, `(batch, variables, components)`, without dropout."""
        with evaluating(self):
            return self._policy(self._state(context, context_lengths))

    @torch.no_grad()
    def respond(
        self,
        context: Tensor,
        context_lengths: Tensor | None = None,
        *,
        codes: Tensor | None = None,
        max_length: int = 60,
        strategy: Literal["greedy", "sample", "beam"] = "greedy",
        **options: Any,
    ) -> tuple[Tensor, ...]:
        """Write one answer to each context.

        Args:
            context, context_lengths: as in `forward`.
            codes: the action, `(batch, variables)` int64; the policy's likeliest when None.
            max_length: most tokens to write, `</s>` counted.
            strategy: "greedy", "sample" or "beam".
            options: further arguments of `LSTMDecoder.generate`.

        Returns:
            tokens `(batch, length)` without `<s>`, and lengths `(batch,)`, as `LSTMDecoder.generate`.

        Raises:
            ValueError: the codes have a wrong shape or value.
        """
        if codes is None:
            codes = self.actions(context, context_lengths)[0][:, 0]
        with evaluating(self):
            state = self._state(context, context_lengths)
        latent = torch.cat([state, self.vae.code_mean(codes).to(state.dtype)], -1)
        return self.decoder.generate(latent, max_length, strategy, **options)

    def _state(self, context: Tensor, lengths: Tensor | None) -> Tensor:
        state: Tensor = self.context_encoder(context, lengths)
        return state

    def _policy(self, state: Tensor) -> Tensor:
        logits = self.policy(state).unflatten(1, (self.vae.variables, self.vae.components))
        return logits.float().log_softmax(-1) if logits.dtype != torch.float64 else logits.log_softmax(-1)
