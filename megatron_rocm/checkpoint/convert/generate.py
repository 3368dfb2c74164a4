"""A few lines of text from an exported folder, with transformers: a look at what was learned."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rocm.errors import UsageError

PROMPTS = ("The", "def __init__(self", "    return")


def generate(
    folder: str | Path,
    prompts: Sequence[str] = PROMPTS,
    *,
    tokens: int = 40,
    temperature: float = 0.8,
    seed: int = 1234,
) -> list[str]:
    """Continue each prompt by up to `tokens` tokens; temperature 0 takes the likeliest one each time.

    The same seed gives the same text. Raises UsageError for a folder without a model or a tokenizer.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder}: no Hugging Face model here (no config.json)")
    if not (folder / "tokenizer_config.json").is_file():
        raise UsageError(f"{folder}: has no tokenizer, since the run had none (mock data); nothing to generate with")

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    how = {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature > 0 else {"do_sample": False}
    lines = []
    for prompt in prompts:
        torch.manual_seed(seed)
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            pad_token_id=model.config.eos_token_id,
            **how,
        )
        lines.append(tokenizer.decode(out[0], skip_special_tokens=True))
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_rocm.checkpoint.convert.generate", description=__doc__)
    parser.add_argument("folder", help="a Hugging Face folder with a tokenizer")
    parser.add_argument("prompts", nargs="*", default=list(PROMPTS), help="texts to go on from")
    parser.add_argument("--tokens", type=int, default=40, help="at most so many for each (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        lines = generate(args.folder, args.prompts, tokens=args.tokens, temperature=args.temperature, seed=args.seed)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    for line in lines:
        print(f"> {line!r}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
