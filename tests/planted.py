"""Train several runs of one world size in the same processes, each with a fault planted in it.

The arguments are the runs' files. Beside each may lie a plan.json, with any of

    kind      output (of a module), gradient (of its output), weight (a module's) or loss, on `rank` alone
    layer     counted from 1, and `module` within it; not for loss
    value     what it is multiplied by
    backward  what the gradient of an output or a loss is multiplied by beside that
    sample    the step that trains on this sample is hit (`weight`: before it starts); `last` makes it all up to that
    start     consumed samples that the run starts at instead of its checkpoint's (or 0)
    scale     the loss scale, set before that step
    fp8       module within each layer that is to have Transformer Engine's state of delayed scaling
    like      folder beside this one's of a run that began with overflows: start where it began to update, at that scale

A run leaves steps.json in its folder: for each step what it came to, and a digest of all that an update changes. How
it ended is in end.json, and what rank 0 has told in told.txt.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from megatron_rocm.config.schema import RunConfig
from megatron_rocm.platform import cpu

cpu.install()

import fp8_state  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from torch.distributed.tensor.debug import _clear_sharding_prop_cache  # noqa: E402

from megatron_rocm.model import build as building  # noqa: E402
from megatron_rocm.model.llama import core  # noqa: E402
from megatron_rocm.train import distributed, loop, ramp  # noqa: E402

# On a CPU there is no FP8: the layers are the torch-only ones, and what looks for divergence sees what `fp8` attaches.
building._fp8 = lambda run: {}
building.fp8.require = lambda run: None
build, resume, train_step = loop.build, loop.resume, loop.train_step


class Planted:
    """A plan at work in one run."""

    def __init__(self, run: RunConfig, plan: dict[str, Any]) -> None:
        self.run, self.plan = run, plan
        self.active = False
        self.modules: list[Any] = []
        self.steps: list[dict[str, Any]] = []

    def build(self, run: RunConfig) -> Any:
        state = build(run)
        plan = self.plan
        for chunk in map(core, state.model) if "fp8" in plan else ():
            for layer in chunk.decoder.layers:
                fp8_state.attach(layer.get_submodule(plan["fp8"]), run)
        if "kind" in plan and dist.get_rank() == plan["rank"]:
            for chunk in map(core, state.model):
                if plan["kind"] == "loss" and chunk.post_process:
                    chunk.register_forward_hook(self.output)
                for layer in chunk.decoder.layers if plan["kind"] != "loss" else ():
                    if layer.layer_number == plan["layer"]:
                        self.modules.append(layer.get_submodule(plan["module"]))
            for module in self.modules:
                if plan["kind"] != "weight":
                    module.register_forward_hook(self.output)
            assert self.modules or plan["kind"] == "loss"
        return state

    def resume(self, run: RunConfig, state: Any) -> Any:
        path = resume(run, state)
        if "start" in self.plan and not self.steps:
            state.consumed_samples = self.plan["start"]
        return path

    def output(self, module: Any, arguments: Any, output: Any) -> Any:
        if not self.active:
            return output
        value = output[0] if isinstance(output, tuple) else output
        backward = self.plan["value"] if self.plan["kind"] == "gradient" else self.plan.get("backward")
        if self.plan["kind"] != "gradient":
            value = value * self.plan["value"]
        if backward is not None and value.requires_grad:
            value.register_hook(lambda gradient: gradient * backward)
        return (value, *output[1:]) if isinstance(output, tuple) else value

    def train_step(self, run: RunConfig, state: Any, batches: Any) -> Any:
        plan, first = self.plan, state.consumed_samples
        sample = plan.get("sample", -1)
        hit = first <= sample < first + ramp.batch_size(run.training, first)
        self.active = hit or sample < first <= plan.get("last", -1)
        if hit and plan.get("kind") == "weight":
            for module in self.modules:
                with torch.no_grad():
                    module.weight[0, 0] *= plan["value"]
        if hit and "scale" in plan:
            for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
                part.grad_scaler._scale.fill_(plan["scale"])
        result = train_step(run, state, batches)
        self.active = False
        fault = result.fault and result.fault.what
        self.steps.append({**result._asdict(), "iteration": state.iteration, "fault": fault, "digest": digest(state)})
        return result


def digest(state: Any) -> str:
    """Of master weights, moments, step counts and the position in the schedule, on all ranks."""
    total = hashlib.sha256(str(state.scheduler.num_steps).encode())
    for part in getattr(state.optimizer, "chained_optimizers", [state.optimizer]):
        for group in part.param_groups:
            for parameter in group["params"]:
                total.update(raw(parameter))
                for value in part.optimizer.state.get(parameter, {}).values():
                    total.update(raw(value))
    everyone = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, total.hexdigest())
    return "".join(everyone)


def raw(value: Any) -> bytes:
    """Of a copy: memory that numpy has seen can't be given back any more, as Megatron-FSDP does."""
    return local(value).detach().float().clone().numpy().tobytes()


def local(value: Any) -> Any:
    return value.to_local() if hasattr(value, "to_local") else value


def plan_beside(path: Path) -> dict[str, Any]:
    file = path.with_name("plan.json")
    plan = json.loads(file.read_text()) if file.exists() else {}
    if "like" in plan:
        steps = json.loads((path.parent.parent / plan["like"] / "steps.json").read_text())
        skipped = [step["updated"] for step in steps].index(True)
        first = sum(step["batch_size"] for step in steps[:skipped])
        plan = {"start": first, "sample": first, "scale": steps[skipped - 1]["loss_scale"]}
    return plan


def main(paths: list[Path]) -> None:
    runs = [RunConfig.load(path) for path in paths]
    distributed.connect(runs[0])
    for path, run in zip(paths, runs, strict=True):
        planted = Planted(run, plan_beside(path))
        loop.build, loop.resume, loop.train_step = planted.build, planted.resume, planted.train_step
        distributed.form_groups(run)
        told = io.StringIO()
        try:
            with contextlib.redirect_stdout(told):
                end = loop.train(run).outcome
        except loop.Diverged as error:
            end = str(error)
        if dist.get_rank() == 0:
            path.with_name("steps.json").write_text(json.dumps(planted.steps))
            path.with_name("end.json").write_text(json.dumps(end))
            path.with_name("told.txt").write_text(told.getvalue())
        dist.barrier()
        parallel_state.destroy_model_parallel()
        _clear_sharding_prop_cache()
    distributed.leave()


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
