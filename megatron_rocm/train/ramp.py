"""The global batch size, constant or growing.

Source: RampupBatchsizeNumMicroBatchesCalculator of megatron/core/num_microbatches_calculator.py, which keeps its
position to itself and hands it out by a global; here the samples consumed so far say it all.
"""

from __future__ import annotations

import math

from megatron_rocm.config.schema import Training


def batch_size(training: Training, consumed: int) -> int:
    """Sequences of the step that follows on `consumed` samples."""
    if not training.rampup:
        return training.global_batch_size
    start, increment, samples = training.rampup
    increments = (training.global_batch_size - start) // increment
    if consumed >= samples or not increments:
        return training.global_batch_size
    return start + int(consumed / (samples / increments)) * increment


def micro_batches(training: Training, consumed: int) -> int:
    """Micro batches of that step on each rank."""
    each = training.global_batch_size // training.num_micro_batches  # MBS·DP
    return batch_size(training, consumed) // each


def samples_of(training: Training, consumed: int, steps: int) -> int:
    """Samples that so many steps take, from `consumed` on."""
    reached = consumed
    while steps and (size := batch_size(training, reached)) < training.global_batch_size:
        assert training.rampup
        start, increment, samples = training.rampup
        number, increments = (size - start) // increment, (training.global_batch_size - start) // increment
        taken = min(steps, max(1, math.ceil(((number + 1) * samples / increments - reached) / size)))
        reached += taken * size
        steps -= taken
    return reached - consumed + steps * training.global_batch_size
