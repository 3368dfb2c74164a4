"""The learning rate's course, by megatron-core's OptimizerParamScheduler."""

from __future__ import annotations

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_rocm.config.schema import RunConfig


def scheduler(run: RunConfig, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warmup from 0, then cosine, linear, constant or WSD; weight decay stays.

    It counts in samples, as in Megatron-LM's checkpoints, and each update advances it by the full batch size: with a
    ramp-up too the course is one of steps.
    """
    settings, batch = run.optimizer, run.training.global_batch_size
    decay = settings.lr_decay_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.lr_warmup_iters * batch,
        lr_decay_steps=decay * batch,
        lr_decay_style=settings.lr_decay_style,
        wsd_decay_steps=(settings.wsd_decay_iters or max(1, decay // 10)) * batch,
        lr_wsd_decay_style=settings.wsd_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=decay * batch,
        wd_incr_style="constant",
        # On resume the position is the checkpoint's, the shape of the curve this run's.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
