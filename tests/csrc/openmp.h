#pragma once

// How many threads omp_get_max_threads allows, and how many a parallel region gets of those it asks for: OpenMP may
// grant fewer. Not to be called from within a region.
void set_threads(int allowed, int granted);
