"""Steps (a) and (e) of run.sh: what an engine says of its own tokens, and figures for benchmarks/scale.py.

The model has Qwen3-0.6B's shape and random weights, of a size that gives logits up to 25, as trained models have.
On a CPU (DEVICE=cpu) it is smaller and the numbers are fewer: a rehearsal.
"""

import json
import os
import random
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import requests
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from smoke import make_models
from smoke.servers import Process, free_port, wait_ready
from smoke.train_slime import as_flags

ON_GPU = os.environ.get("DEVICE") == "cuda"
VOCABULARY = 151_936 if ON_GPU else 4_096
SHAPE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28 if ON_GPU else 2}
SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": VOCABULARY}
SHAPE |= {"tie_word_embeddings": True, "max_position_embeddings": 40_960, "layer_types": None}
LOGIT_SCALE = 8.0  # of the last norm: the logits' standard deviation is about 5
KERNELS = {"attention-backend": "triton", "sampling-backend": "pytorch", "cuda-graph-backend-prefill": "disabled"}
ON_CPU = {"device": "cpu", "attention-backend": "torch_native", "max-total-tokens": 65536, "sleep-on-idle": True}
ENGINE = KERNELS if ON_GPU else ON_CPU  # SGLang's settings: what an engine without further packages has
SAVER = ["--enable-memory-saver"] if ON_GPU else []
TURNS, SAMPLED, OBSERVED, PROMPT = 6, 40, 60, 500  # of the one episode, in tokens
AT_ONCE = (8, 64, 256) if ON_GPU else (2, 4)
PREFILLED, DECODED = (1024, 256) if ON_GPU else (64, 8)
START_S = 600


class Engine(Process):
    """SGLang's own server in bfloat16, as the run script starts the teacher's; on a CPU through smoke.serve."""

    def __init__(self, name: str, model: Path, out: Path, *flags: str, share: float = 0.3) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        command = [sys.executable, "-m", "sglang.launch_server" if ON_GPU else "smoke.serve", "--host", "127.0.0.1"]
        command += ["--port", str(port), "--model-path", str(model), "--dtype", "bfloat16", *flags]
        command += as_flags(ENGINE | {"mem-fraction-static": share})
        super().__init__(name, command, out / f"{name}.log")
        self.started = time.monotonic()

    def wait_ready(self) -> float:
        """Seconds of the start."""
        wait_ready(self, self.url, START_S)
        return time.monotonic() - self.started

    def post(self, path: str, **values: Any) -> Any:
        reply = requests.post(f"{self.url}/{path}", json=values, timeout=300)
        if not reply.ok:
            raise RuntimeError(f"{self.name} /{path}: {reply.status_code} {reply.text[:500]}")
        return reply.json() if "json" in reply.headers.get("content-type", "") else reply.text

    def generate(self, ids: list, tokens: int, **values: Any) -> Any:
        params = {"max_new_tokens": tokens, "temperature": 1.0, "ignore_eos": True}
        return self.post("generate", input_ids=ids, sampling_params=params, **values)

    def memory(self) -> dict[str, float]:
        """GB of the weights, of the cache and of the graphs, and the cache's tokens, as SGLang counts them."""
        info = requests.get(f"{self.url}/server_info", timeout=60).json()
        return info["internal_states"][0]["memory_usage"]


def report(step: str, **values: Any) -> None:
    """One line of results; they are there when the step is ended."""
    rounded = {name: round(value, 5) if isinstance(value, float) else value for name, value in values.items()}
    line = json.dumps({"step": step, **rounded})
    print(line, flush=True)
    with open(f"{os.environ['RESULTS']}/results.jsonl", "a") as file:
        file.write(line + "\n")


def make_model(folder: Path) -> int:
    """A checkpoint with random weights; returns its parameters."""
    torch.manual_seed(1)
    tiny = Qwen3Config.from_pretrained(make_models.SHIPPED)
    with torch.device("cuda" if ON_GPU else "cpu"):
        model = AutoModelForCausalLM.from_config(Qwen3Config.from_dict({**tiny.to_dict(), **SHAPE})).to(torch.bfloat16)
    with torch.no_grad():
        model.model.norm.weight.fill_(LOGIT_SCALE)
    copy_tokenizer(folder)
    model.save_pretrained(folder)
    count = sum(value.numel() for value in model.parameters())
    del model
    if ON_GPU:
        torch.cuda.empty_cache()
    return count


def copy_tokenizer(folder: Path) -> None:
    """The smoke run's, without its model."""
    folder.mkdir(parents=True)
    for file in make_models.SHIPPED.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", "losses.json"):
            (folder / file.name).write_bytes(file.read_bytes())


def random_ids(count: int) -> list[int]:
    return [random.randrange(1, VOCABULARY - 2) for _ in range(count)]


def play(engine: Engine) -> tuple[list[int], list[int], list[float]]:
    """An episode's ids, the places of those that were sampled, and their log-probs when they were."""
    ids, places, sampled = random_ids(PROMPT), [], []
    for _ in range(TURNS):
        reply = engine.generate(ids, SAMPLED, return_logprob=True)
        entries = reply["meta_info"]["output_token_logprobs"]
        places += range(len(ids), len(ids) + len(entries))
        sampled += [entry[0] for entry in entries]
        ids += [entry[1] for entry in entries] + random_ids(OBSERVED)
    return ids[:-OBSERVED], places, sampled


def score(engine: Engine, ids: list[int], places: list[int]) -> list[float]:
    """The log-probs of the same tokens, as a teacher's server is asked for them."""
    start = places[0] - 1
    reply = engine.generate(ids, 0, return_logprob=True, logprob_start_len=start)
    entries = reply["meta_info"]["input_token_logprobs"]
    assert len(entries) == len(ids) - start
    return [entries[place - start][0] for place in places]


def differences(one: list[float], other: list[float]) -> dict[str, float]:
    signed = [a - b for a, b in zip(one, other, strict=True)]
    return {"mean": mean(signed), "mean_abs": mean(map(abs, signed)), "max_abs": max(map(abs, signed))}


def side_by_side(out: Path, engines: dict[str, Engine]) -> tuple[list[int], list[int], list[float]]:
    """Step (a). Returns the first engine's episode and its scores."""
    episodes, scores = {}, {}
    for name, engine in engines.items():
        seconds = engine.wait_ready()
        ids, places, sampled = episodes[name] = play(engine)
        engine.post("flush_cache")
        scores[name] = score(engine, ids, places)
        found = differences(sampled, scores[name])
        report(f"a {name}", start_s=seconds, tokens=len(places), logprob=mean(sampled), **found)
        pairs = [[ids[place], *pair] for place, *pair in zip(places, sampled, scores[name], strict=True)]
        (out / f"logprobs_{name}.json").write_text(json.dumps(pairs))
        assert found["mean_abs"] < 0.1, "an engine's scores are not those of what it samples"
    one, other = engines
    ids, places, _ = episodes[one]
    report(f"a {one} and {other}, scores", **differences(scores[one], score(engines[other], ids, places)))
    return ids, places, scores[one]


def speeds(engine: Engine) -> None:
    """Step (e): tokens per second of prefill, of scoring and of decoding, with so many episodes at once."""
    for count in AT_ONCE:
        values = {}
        for name, length, new, more in (
            ("prefill", PREFILLED, 1, {}),
            ("score", PREFILLED, 0, {"return_logprob": True, "logprob_start_len": 0}),
            ("decode", 16, DECODED, {}),
        ):
            engine.post("flush_cache")
            prompts = [random_ids(length) for _ in range(count)]
            started = time.monotonic()
            engine.generate(prompts, new, **more)
            values[f"{name}_tokens_per_s"] = (
                count * (new if name == "decode" else length) / (time.monotonic() - started)
            )
        report(f"e {count} at once", **values)


def memory(engine: Engine, parameters: int) -> None:
    """Step (e): what the engine says of its memory, and what docs/CLUSTER.md's arithmetic says of it, in GB."""
    found = engine.memory()
    layers, heads, size = (SHAPE[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"))
    per_token = layers * heads * size * 2 * 2
    expected = {"weight_arithmetic": 2 * parameters / 2**30}
    expected["kvcache_arithmetic"] = per_token * found["token_capacity"] / 2**30
    report("e memory", **found, **expected, cache_bytes_per_token=per_token, parameters=parameters)


def used() -> float:
    """GB of the GPU that are in use, by all processes."""
    if not ON_GPU:
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def switch(engine: Engine, model: Path, ids: list[int], places: list[int], before: list[float]) -> None:
    """Step (e): seconds to give memory back, to take it, and to load weights, after which scores are as before."""
    seconds, gb = {}, {"used_gb": used()}
    paths = [("push_from_disk", "update_weights_from_disk", {"model_path": str(model)})]
    if ON_GPU:
        paths = [(f"{name}_memory", f"{name}_memory_occupation", {}) for name in ("release", "resume")] + paths
    engine.post("flush_cache")
    for name, path, values in paths:
        started = time.monotonic()
        engine.post(path, **values)
        seconds[f"{name}_s"] = time.monotonic() - started
        gb[f"used_gb_after_{name}"] = used()
    engine.post("flush_cache")
    report("e switch", **seconds, **gb, **differences(score(engine, ids, places), before))


def main() -> None:
    random.seed(1)
    out = Path(os.environ["RESULTS"])
    model = out / "work/qwen3_0.6b"
    parameters = make_model(model)
    with Engine("bf16", model, out, *SAVER) as engine:
        engine.wait_ready()  # compiles what the other one finds
        with Engine("fp32_head", model, out, "--enable-fp32-lm-head") as other:
            episode = side_by_side(out, {"bf16": engine, "fp32_head": other})
        speeds(engine)
        memory(engine, parameters)
        switch(engine, model, *episode)


if __name__ == "__main__":
    main()
