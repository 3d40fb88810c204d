"""`aerogel generate PATH "prompt" ...`: text from a model, on the kernels it will be served with."""

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

Prompts = Annotated[
    list[str], typer.Argument(metavar="PROMPT...", help="What to answer or to continue; several as one batch. - reads stdin.")
]
Lines = Annotated[bool, typer.Option("--lines", help="Every line of what is given is a prompt by itself.")]
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
    prompt: Prompts,
    lines: Lines = False,
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
    """Generate text, streamed. Uses the chat template of the tokenizer where there is one.

    Several prompts are answered together; each answer is written, below its prompt, when it and those before it are complete.
    """
    with session(json=json, quiet=quiet, debug=debug, threads=threads) as output:
        from aerogel.errors import BadInput
        from aerogel.kernels.decode.loop import LOOPS, Decoder
        from aerogel.kernels.decode.sample import Sampling
        from aerogel.kernels.linear import round_activations
        from aerogel.model.direct import load_to_decode
        from aerogel.model.pipeline import pick_device, tokenizer_of
        from aerogel.model.source import resolve

        texts = prompts_of(prompt, lines)
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
        ids = [encode(tokenizer, text, raw)[0] for text in texts]
        writer = Writer(output.stdout if stream else None, texts)
        answer = generate(decoder, tokenizer, ids, new_tokens, sampling, stop or [], writer)
        if stream:
            output.note(summary(answer))
        for one, text in zip(answer["answers"], texts, strict=True):
            one["prompt"] = text
        alone = answer["answers"][0] if len(texts) == 1 else {}
        output.result({"model": model, "activations": activations or "stored", **alone, **answer})


def prompts_of(given: list[str], lines: bool) -> list[str]:
    """The prompts: what was written, stdin for -, each line of it where that is asked for (empty ones are none)."""
    from aerogel.errors import BadInput

    if given.count("-") > 1:
        raise BadInput("- stands for stdin, which can be read once; write it once")
    texts = [sys.stdin.read() if text == "-" else text for text in given]
    if lines:
        texts = [line for text in texts for line in text.splitlines() if line.strip()]
    if not texts or not all(text.strip() for text in texts):
        raise BadInput("the prompt is empty; write some text, or - to read it from stdin")
    return texts


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


def _write(stdout: Any, text: str) -> None:
    if stdout is not None and text:
        stdout.write(text)
        stdout.flush()


class Writer:
    """Answers on a stream: of one prompt as it comes, of several each as a whole, in their order and below their prompts."""

    def __init__(self, stdout: Any, prompts: list[str]) -> None:
        self.stdout, self.prompts = stdout, prompts
        self._pieces: list[list[str]] = [[] for _ in prompts]
        self._ended = [False] * len(prompts)
        self._written = 0

    def piece(self, index: int, text: str) -> None:
        """More of an answer."""
        self._pieces[index].append(text)
        if len(self.prompts) == 1:
            _write(self.stdout, text)

    def end(self, index: int) -> str:
        """An answer is complete; returns it."""
        self._ended[index] = True
        while len(self.prompts) > 1 and self._written < len(self.prompts) and self._ended[self._written]:
            _write(self.stdout, f"> {self.prompts[self._written]}\n{''.join(self._pieces[self._written])}\n\n")
            self._written += 1
        if len(self.prompts) == 1:
            _write(self.stdout, "\n")
        return "".join(self._pieces[index])


def generate(
    decoder: Decoder,
    tokenizer: Any,
    prompts: list[Any],
    new_tokens: int,
    sampling: Sampling,
    stop: list[str],
    writer: Writer,
) -> dict[str, Any]:
    """Text and tokens of each answer, seconds, tokens per second of all together and what ran.

    Args:
        prompts: token ids [T_b] of each.
        writer: is told what comes.
    """
    from aerogel.eval.decode import facts
    from aerogel.kernels.decode.text import TextStream

    words = [TextStream(tokenizer, stop) for _ in prompts]
    counts, open_, texts = [0] * len(prompts), set(range(len(prompts))), [""] * len(prompts)
    behind_first, first = 0, 0.0
    start = time.perf_counter()

    def close(index: int) -> None:
        writer.piece(index, words[index].finish())
        texts[index] = writer.end(index)
        open_.discard(index)

    steps = decoder.stream(prompts, new_tokens, sampling=sampling, stop=ends(decoder.model))
    for step, tokens in enumerate(steps):
        first = first or time.perf_counter() - start
        for index in sorted(open_):
            token = tokens[index]
            if token is not None:
                counts[index] += 1
                behind_first += step > 0
                writer.piece(index, words[index].push(token))
            if token is None or words[index].stopped:
                close(index)
        if not open_:
            break
    for index in sorted(open_):
        close(index)
    seconds = time.perf_counter() - start
    ran = facts(decoder)
    rest = seconds - first - ran.get("prepare_seconds", 0.0)
    return {
        "answers": [{"text": text, "tokens": count} for text, count in zip(texts, counts, strict=True)],
        "tokens": sum(counts),
        "seconds": seconds,
        "first_token_seconds": first,
        "tokens_per_second": sum(counts) / seconds,
        "decode_tokens_per_second": behind_first / rest if behind_first and rest > 0 else None,
        "ran": ran,
        "ignored": ignored(decoder.model),
    }


def summary(answer: dict[str, Any]) -> str:
    """One line about the speed and the loop, with what it took to prepare and why no faster loop ran."""
    ran = answer["ran"]
    many = len(answer["answers"])
    parts = [f"{answer['tokens']} tokens in {answer['seconds']:.2f} s" + (f" for {many} prompts" if many > 1 else "")]
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
