"""A scripted model on a server, and the tools that play episodes with it."""

import gc
import json
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from aiohttp import web
from transformers import AutoTokenizer

from tests.support.fake_sglang import FakeSGLang, generated, scored

HORIZON = 5
RIGHT, LEFT = "<action>right</action>", "<action>left</action>"
ODD = "<|im_start|>"
THOUGHT = "<think>\nIt is on the right.\n</think>\n\n"


class Rig:
    """A scripted model: the n-th episode of a goal begins with openings[goal][n], every later turn says RIGHT."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder, self.checkpoint = folder, checkpoint
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.openings: dict[int, list[str]] = defaultdict(lambda: [RIGHT])
        self.begun: Counter[int] = Counter()
        self.answers = 10**6  # then the server is gone
        self.server = FakeSGLang(self.reply)
        self.server.pages["/server_info"] = {"max_req_input_len": 4000}
        self.config = folder / "tcod.yaml"
        settings = {"tcod_variant": "b2f", "tcod_horizon": HORIZON, "tcod_environment": "tests.support.toys.Corridor"}
        settings |= {"tcod_data_root": str(folder), "tcod_admissible": "never", "tcod_env_workers": 1}
        self.config.write_text(yaml.safe_dump(settings))

    async def reply(self, payload: dict) -> dict | web.Response:
        if "text" in payload:  # the launch check
            return scored(
                {**payload, "input_ids": self.tokenizer.encode(payload["text"])}, lambda position, token: -1.0
            )
        self.answers -= 1
        if self.answers < 0:
            return web.Response(status=503)
        context = self.tokenizer.decode(payload["input_ids"])
        text = RIGHT
        if context.count("<|im_start|>assistant") == 1:
            goal = int(context.split("Goal: door ")[1].split(".")[0])
            text = self.openings[goal][self.begun[goal] % len(self.openings[goal])]
            self.begun[goal] += 1
        ids = self.tokenizer.encode(text, add_special_tokens=False) + [self.tokenizer.eos_token_id]
        return generated(ids, [-0.1] * len(ids), prompt_tokens=len(payload["input_ids"]))

    def rows(self, *goals: int, add: bool = False, **more: object) -> Path:
        path = self.folder / "rows.jsonl"
        rows = [{"prompt": "walk", "label": f"walk {goal}", "metadata": {"goal": goal, **more}} for goal in goals]
        with path.open("a" if add else "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return path

    def command(self, rows: Path, out: str, *more: str) -> list[str]:
        return [
            *("--rows", str(rows), "--out", str(self.folder / out), "--url", self.server.url),
            *("--model", str(self.checkpoint), "--config", str(self.config), "--max-turn-len", "64"),
            *("--max-context-len", "2000", "--concurrency", "4", *more),
        ]

    def run(self, script: ModuleType, rows: Path, out: str, *more: str) -> None:
        """The script's main(), without Ray and worker processes."""
        gc.collect()  # the process of the run before has ended, and its lock
        self.monkeypatch.setattr(sys, "argv", [script.__name__, *self.command(rows, out, *more)])
        script.main()

    def refusal(self, script: ModuleType, rows: Path, out: str, *more: str) -> str:
        with pytest.raises(SystemExit) as error:
            self.run(script, rows, out, *more)
        assert "\n" not in str(error.value)
        return str(error.value)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
