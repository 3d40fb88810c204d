"""`aerogel generate PATH "prompt"`: text from a model, on the kernels it will be served with."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from aerogel.cli import options
from aerogel.cli.output import session

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer or to continue; - reads stdin.")]
Tokens = Annotated[int, typer.Option("--new-tokens", "-n", metavar="N", min=1, help="Longest answer.")]
Temperature = Annotated[float, typer.Option("--temperature", metavar="T", min=0.0, help="0 takes the likeliest token.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the sampling.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]


def command(
    model: options.RequiredModel,
    prompt: Prompt,
    new_tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    raw: Raw = False,
    device: options.Device = "auto",
    json: options.Json = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    threads: options.Threads = None,
) -> None:
    """Generate text, streamed. Uses the chat template of the tokenizer where there is one."""
    with session(json=json, quiet=quiet, debug=debug, threads=threads) as output:
        import torch

        from aerogel.errors import BadInput
        from aerogel.model.loading import load
        from aerogel.model.pipeline import pick_device, tokenizer_of
        from aerogel.model.source import resolve

        text = sys.stdin.read() if prompt == "-" else prompt
        if not text.strip():
            raise BadInput("the prompt is empty; write some text, or - to read it from stdin")
        folder = resolve(model)
        tokenizer = tokenizer_of(folder)()
        runner = load(folder, device=pick_device(device))
        torch.manual_seed(seed)
        stream = not quiet and json != "-"
        answer = generate(
            runner, tokenizer, encode(tokenizer, text, raw), new_tokens, temperature, output.stdout if stream else None
        )
        output.result({"model": model, "prompt": text, **answer})


def encode(tokenizer: Any, text: str, raw: bool) -> Any:
    """Token ids [1, T] of the prompt, as a chat turn where the tokenizer has a template."""
    if raw or not getattr(tokenizer, "chat_template", None):
        return tokenizer(text, return_tensors="pt")["input_ids"]
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]


def generate(
    model: Any,
    tokenizer: Any,
    ids_1T: Any,
    new_tokens: int,
    temperature: float,
    stdout: Any,
) -> dict[str, Any]:
    """Text, number of tokens, seconds and tokens per second; streamed to `stdout` where given."""
    import torch
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        """transformers' streamer prints on sys.stdout, which is redirected while a command runs."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Writes a finished piece of text."""
            stdout.write(text + ("\n" if stream_end else ""))
            stdout.flush()

    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    streamer = Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stdout is not None else None
    ids_1T = ids_1T.to(model.device)
    start = time.perf_counter()
    with torch.inference_mode():
        found = model.generate(
            ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            max_new_tokens=new_tokens,
            streamer=streamer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    seconds = time.perf_counter() - start
    new = found[0, ids_1T.shape[1] :]
    return {
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "seconds": seconds,
        "tokens_per_second": len(new) / seconds,
    }
