"""`aerogel generate PATH "prompt"`: text from a model, on the kernels it will be served with."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aerogel.cli import options
from aerogel.cli.output import session

if TYPE_CHECKING:
    from aerogel.kernels.decode.loop import Decoder
    from aerogel.kernels.decode.sample import Sampling

Prompt = Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer or to continue; - reads stdin.")]
Tokens = Annotated[int, typer.Option("--new-tokens", "-n", metavar="N", min=1, help="Longest answer.")]
Temperature = Annotated[float, typer.Option("--temperature", metavar="T", min=0.0, help="0 takes the likeliest token.")]
TopK = Annotated[int, typer.Option("--top-k", metavar="N", min=0, help="Draw among the N likeliest tokens; 0 for all.")]
TopP = Annotated[float, typer.Option("--top-p", metavar="P", help="Draw among the likeliest tokens that together reach P.")]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End where this text comes up. Repeatable.")]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of the sampling.")]
Raw = Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")]
LoopName = Annotated[
    str, typer.Option("--loop", metavar="NAME", help="auto, direct, fused, masked or plain: how steps are run.")
]
Merge = Annotated[bool, typer.Option("--merge/--no-merge", help="One linear for those that read the same input.")]


def command(
    model: options.RequiredModel,
    prompt: Prompt,
    new_tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    raw: Raw = False,
    loop: LoopName = "auto",
    merge: Merge = True,
    activations: options.Activations = None,
    bits: options.Bits = None,
    device: options.Device = "auto",
    json: options.Json = None,
    quiet: options.Quiet = False,
    debug: options.Debug = False,
    threads: options.Threads = None,
) -> None:
    """Generate text, streamed. Uses the chat template of the tokenizer where there is one."""
    with session(json=json, quiet=quiet, debug=debug, threads=threads) as output:
        from aerogel.errors import BadInput
        from aerogel.kernels.decode.loop import LOOPS, Decoder
        from aerogel.kernels.decode.sample import Sampling
        from aerogel.kernels.linear import round_activations
        from aerogel.model.direct import load_to_decode
        from aerogel.model.pipeline import pick_device, tokenizer_of
        from aerogel.model.source import resolve

        text = sys.stdin.read() if prompt == "-" else prompt
        if not text.strip():
            raise BadInput("the prompt is empty; write some text, or - to read it from stdin")
        if loop not in LOOPS:
            raise BadInput(f"unknown loop '{loop}'; write one of {', '.join(LOOPS)}")
        if activations not in (None, "stored", "int8"):
            raise BadInput(f"unknown activations '{activations}'; write stored or int8")
        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        folder = resolve(model)
        tokenizer = tokenizer_of(folder)()
        loaded = load_to_decode(folder, loop=loop, device=pick_device(device), merge=merge, bits=bits)
        if activations == "int8":
            round_activations(loaded)
        decoder = Decoder(loaded, loop)  # type: ignore[arg-type]
        stream = not quiet and json != "-"
        ids_1T = encode(tokenizer, text, raw)
        answer = generate(decoder, tokenizer, ids_1T, new_tokens, sampling, stop or [], output.stdout if stream else None)
        if stream:
            output.note(summary(answer))
        output.result({"model": model, "prompt": text, "activations": activations or "stored", **answer})


def encode(tokenizer: Any, text: str, raw: bool) -> Any:
    """Token ids [1, T] of the prompt, as a chat turn where the tokenizer has a template."""
    if raw or not getattr(tokenizer, "chat_template", None):
        return tokenizer(text, return_tensors="pt")["input_ids"]
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]


def ends(model: Any) -> frozenset[int]:
    """The tokens that end an answer, of the generation config, else of the config."""
    for config in (getattr(model, "generation_config", None), model.config):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_new_tokens": 0, "min_p": 0.0, "typical_p": 1.0,
    "suppress_tokens": None, "begin_suppress_tokens": None, "bad_words_ids": None, "forced_eos_token_id": None,
}  # fmt: skip
"""What a generation config may ask for beside the options above, and the value that asks for nothing."""


def ignored(model: Any) -> list[str]:
    """Settings of the model's generation config that this command does not follow."""
    config = getattr(model, "generation_config", None)
    found = {name: getattr(config, name, None) for name in NEUTRAL}
    return [f"{name}={value}" for name, value in found.items() if value is not None and value != NEUTRAL[name]]


def generate(
    decoder: Decoder,
    tokenizer: Any,
    ids_1T: Any,
    new_tokens: int,
    sampling: Sampling,
    stop: list[str],
    stdout: Any,
) -> dict[str, Any]:
    """Text, tokens, seconds, tokens per second and what ran; streamed to `stdout` where given."""
    from aerogel.eval.decode import facts
    from aerogel.kernels.decode.text import TextStream

    words, pieces, tokens, first = TextStream(tokenizer, stop), [], 0, 0.0
    start = time.perf_counter()
    for (token,) in decoder.stream([ids_1T[0]], new_tokens, sampling=sampling, stop=ends(decoder.model)):
        if token is None:
            break
        tokens += 1
        first = first or time.perf_counter() - start
        pieces.append(words.push(token))
        _write(stdout, pieces[-1])
        if words.stopped:
            break
    pieces.append(words.finish())
    seconds = time.perf_counter() - start
    _write(stdout, pieces[-1] + "\n")
    ran = facts(decoder)
    rest = seconds - first - ran.get("prepare_seconds", 0.0)
    return {
        "text": "".join(pieces),
        "tokens": tokens,
        "seconds": seconds,
        "first_token_seconds": first,
        "tokens_per_second": tokens / seconds,
        "decode_tokens_per_second": (tokens - 1) / rest if tokens > 1 and rest > 0 else None,
        "ran": ran,
        "ignored": ignored(decoder.model),
    }


def _write(stdout: Any, text: str) -> None:
    if stdout is not None and text:
        stdout.write(text)
        stdout.flush()


def summary(answer: dict[str, Any]) -> str:
    """One line about the speed and the loop, with what it took to prepare and why no faster loop ran."""
    ran = answer["ran"]
    parts = [f"{answer['tokens']} tokens in {answer['seconds']:.2f} s"]
    if answer["decode_tokens_per_second"]:
        parts.append(f"{answer['decode_tokens_per_second']:.1f} tokens/s behind the first")
    if ran.get("rounding"):
        parts.append(f"{ran['rounding']} linears round their inputs to int8")
    parts.append(f"{ran['loop'] or 'no'} loop" + (" in a CUDA graph" if ran["graph"] else ""))
    if "prepare_seconds" in ran:
        parts.append(f"prepared in {ran['prepare_seconds']:.2f} s")
    parts += [f"not {way}: {why}" for way, why in ran.get("not", {}).items()]
    parts += [f"the model's generation config asks for {setting}, which was not done" for setting in answer["ignored"]]
    return "; ".join(parts)
