"""The reference: transformers' LlamaForCausalLM in FP32 with torch's own optimizer, on the same samples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from megatron_rocm.checkpoint.convert.huggingface import llama_config
from megatron_rocm.checkpoint.convert.table import weights
from megatron_rocm.config.schema import Model, RunConfig
from megatron_rocm.model import documents
from megatron_rocm.model.llama import core


def exported(chunk: Any, model: Model) -> dict[str, Tensor]:
    """Hugging Face's weights of a model in one process, in FP32, as copies in the CPU's memory."""
    ours = dict(core(chunk).named_parameters())
    found: dict[str, Tensor] = {}
    for weight in weights(model):
        parameter = ours[weight.local] if weight.local in ours else ours[weight.megatron]
        parts = weight.to_hugging_face(parameter.detach(), model)
        found |= {name: part.to("cpu", torch.float32, copy=True) for name, part in parts.items()}
    return found


def build(run: RunConfig, state: Mapping[str, Tensor]) -> Any:
    """LlamaForCausalLM with these weights, in FP32, ready to train."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # a model that is shorter than Llama 3.1's own context is meant here
    fields = llama_config(run.model, dtype="float32", bos=None, eos=run.data.eod)
    model = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="sdpa"))
    missing, unexpected = model.load_state_dict(dict(state), strict=False)
    # Tied, the output layer is the embedding; transformers has a second name for it.
    assert not unexpected and set(missing) <= {"lm_head.weight"} and bool(missing) <= run.model.tied_embeddings
    return model.to("cuda" if run.hardware.vendor != "cpu" else "cpu").train()


def logits(run: RunConfig, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """[rows, sequence, vocab_size] of a batch as the data set gives it."""
    device = next(model.parameters()).device
    mask = _documents(batch["tokens"], run.data.eod).to(device) if run.data.reset_attention_mask else None
    answer = model(
        input_ids=batch["tokens"].to(device),
        position_ids=batch["position_ids"].to(device),
        attention_mask=mask,
        use_cache=False,
    )
    return answer.logits


def loss_sum(run: RunConfig, model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross entropy summed over the batch's tokens that count."""
    scores = logits(run, model, batch)
    labels, counts = batch["labels"].to(scores.device), batch["loss_mask"].to(scores.device)
    losses = torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none")
    return (losses * counts.flatten()).sum(dtype=torch.float64)


def _documents(tokens: Tensor, eod: int) -> Tensor:
    """True where a token [rows, 1, query, key] may look: back, within its own document."""
    rows = []
    for lengths in documents.lengths(tokens, eod):
        rows.append(torch.block_diag(*(torch.ones(length, length) for length in lengths)).tril().bool())
    return torch.stack(rows).unsqueeze(1)


def forward_backward(run: RunConfig, model: Any, dataset: Dataset[Any], step: int) -> float:
    """Gradients of the mean loss over global batch `step`, from 0, and that loss."""
    model.zero_grad()
    size, rows = run.training.global_batch_size, run.training.micro_batch_size
    batches = [
        default_collate([dataset[sample] for sample in range(first, first + rows)])
        for first in range(step * size, (step + 1) * size, rows)
    ]
    tokens = max(1.0, sum(batch["loss_mask"].sum().item() for batch in batches))
    total = 0.0
    for batch in batches:
        loss = loss_sum(run, model, batch)
        (loss / tokens).backward()
        total += loss.item()
    return total / tokens


def gradients(run: RunConfig, model: Any) -> Iterator[tuple[str, list[Tensor]]]:
    """As `parity.gradients.whole`: transformers' gradients under our names. The mapping of weights is linear."""
    theirs = {name: parameter.grad for name, parameter in model.named_parameters()}
    padded = run.model.model_copy(update={"padded_vocab_size": run.model.vocab_size})  # without rows of padding
    for weight in weights(run.model):
        yield weight.local, [torch.cat(tuple(weight.to_megatron(theirs, padded)))]


def optimizer(run: RunConfig, model: Any) -> torch.optim.Optimizer:
    """AdamW or SGD with megatron-core's hyperparameters; vectors are not decayed."""
    of = run.optimizer
    parameters = list(model.parameters())
    groups: Sequence[dict[str, Any]] = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": of.weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    if of.name == "sgd":
        return torch.optim.SGD(groups, lr=of.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=of.lr, betas=(of.adam_beta1, of.adam_beta2), eps=of.adam_eps)


def update(run: RunConfig, model: Any, optimizer: torch.optim.Optimizer, learning_rate: float) -> float:
    """Clip and step; the gradient's norm before clipping."""
    # In FP64: torch's own norm of many elements is off by 1e-5 on a CPU.
    parts = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in model.parameters()]
    norm = torch.stack(parts).square().sum().sqrt()
    if run.optimizer.clip_grad:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), run.optimizer.clip_grad, norm.float())
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    return norm.item()
