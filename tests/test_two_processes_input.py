"""Two separate processes, with other threads and another starting point, make the batches of one."""

import subprocess
import sys

import data_fixtures as toy
import numpy as np

from mmkd_jax.data.batches import Batches

PROGRAM = """
import sys, numpy as np
sys.path.insert(0, {tests!r})
import data_fixtures as toy
from absl import flags
from mmkd_jax.data.batches import Batches
from mmkd_jax.data.features import FeatureSet
from mmkd_jax.data.pairs import PairsSet
flags.FLAGS.mark_as_parsed()
root, index, start, threads = sys.argv[1], *map(int, sys.argv[2:])
pairs = PairsSet.open(root + "/pairs")
batches = Batches(pairs, batch=8, seed=1, policy=toy.POLICY, image_size=8, tokenizer=toy.CharTokenizer(), block=4,
                  window=3, caption="random", features={{"t": FeatureSet.open(root + "/t", pairs)}}, process=(index, 2))
arrays = {{}}
for step, batch in batches.iterate(start, 9, threads=threads):
    target = batch["targets"]["t"]
    vectors = (target[tower].view(np.uint8) for tower in ("image", "text"))  # NumPy's files do not know bfloat16
    fields = (batch["row"], batch["image"], batch["text"].ids, *vectors, target["present"])
    arrays |= {{f"{{step}}/{{i}}": field for i, field in enumerate(fields)}}
np.savez(f"{{root}}/{{index}}.npz", **arrays)
"""


def test_two_processes_make_the_batches_of_one(tmp_path, repository):
    pairs = toy.make_pairs(tmp_path / "pairs")
    features = toy.make_features(tmp_path / "t", pairs)
    program = PROGRAM.format(tests=str(repository / "tests"))
    starts = (("0", "0", "2"), ("1", "4", "1"))  # index, first step, threads
    running = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path), *args], cwd=repository, stderr=subprocess.PIPE)
        for args in starts
    ]
    for process in running:
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint.decode()
    parts = [np.load(tmp_path / f"{i}.npz") for i in range(2)]
    one = Batches(
        pairs, batch=8, seed=1, policy=toy.POLICY, image_size=8, tokenizer=toy.CharTokenizer(), block=4, window=3,
        caption="random", features={"t": features},
    )  # fmt: skip
    for step in range(4, 9):
        batch = one.batch(step)
        target = batch["targets"]["t"]
        vectors = (target[tower].view(np.uint8) for tower in ("image", "text"))
        fields = (batch["row"], batch["image"], batch["text"].ids, *vectors, target["present"])
        for i, field in enumerate(fields):
            np.testing.assert_array_equal(np.concatenate([part[f"{step}/{i}"] for part in parts]), field)
    assert not np.array_equal(parts[0]["4/0"], parts[1]["4/0"])  # the processes have different rows
