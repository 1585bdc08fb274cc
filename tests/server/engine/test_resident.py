"""What fifty versions take, by the engine's own count and by what the system gives the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system does not say what is resident"),
]

_PROCESS = """
import ctypes, gc, json, os
import torch

from errata.editor.checkpoints import load_model
from errata.editor.delta import Delta, LowRank
from errata.editor.prompts import Prompt
from errata.server.engine import Engine, Generation

torch.set_num_threads(1)
atlas = load_model("atlas")
name = atlas.down_projection_name(1)
out, into = atlas.model.get_submodule(name).weight.shape
base = sum(p.nbytes for p in atlas.model.parameters())

def rank_eight(seed):
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(8, into, generator=random) * 0.05, torch.randn(out, 8, generator=random) * 0.05
    return [Delta(base_sha256=atlas.base_sha256, layers={1: LowRank(a=a, b=b)}, modules={1: name})]

engine = Engine(atlas, lambda version: rank_eight(version) if version else [])
engine.start()

def ask(versions):
    question = Prompt(text="What is the capital of Kazakhstan?")
    asked = [engine.generate(Generation(version=v, prompt=question, max_new_tokens=2)) for v in versions]
    for handle in asked:
        handle.result(120)

def figures(versions):
    ask(versions)
    ask([0])  # nothing of the last batch is held any more
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {"resident": resident, "counted": engine.versions_memory_bytes, "loaded": len(engine.loaded_versions)}

# The first fifty also take what a batch of that many takes once and for all; the next ones take what versions take.
print(json.dumps({"base": base, "before": figures(range(1, 51)), "after": figures(range(51, 101))}))
engine.close()
"""

RESIDENT = 0.1
"""Of the base, at most. Beside its factors a version is a few objects and what lies unused between them, about 2 KiB
whatever its rank: 0.5 % of a model as small as Atlas, and nothing of a larger one."""


def test_fifty_versions_add_less_than_a_tenth_of_the_base_to_the_count_and_to_the_process(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # With one heap for all threads, what one frees another uses.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", _PROCESS], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    before, after = found["before"], found["after"]
    assert after["loaded"] - before["loaded"] == 50
    counted, resident = ((after[key] - before[key]) / found["base"] for key in ("counted", "resident"))
    with capsys.disabled():
        sys.stdout.write(f"\n50 versions of rank 8: {counted:.1%} of the base counted, {resident:.1%} resident\n")
    assert 0.01 < counted < 0.1
    assert resident < RESIDENT
