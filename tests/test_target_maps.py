"""Target maps against what defines them, the authors' auto-encoder against torch, the artefacts and their command."""

import data_fixtures as toy
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from mmkd_jax import cli
from mmkd_jax.errors import InputError
from mmkd_jax.tasks import autoencoder, maps
from mmkd_jax.tasks.hadamard import hadamard

WIDTH = 12


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return toy.make_pairs(tmp_path_factory.mktemp("set") / "pairs", 40)


@pytest.fixture(scope="module")
def features(pairs, tmp_path_factory):
    """Two teachers of different widths, float32 so that statistics are of what is read."""
    root = tmp_path_factory.mktemp("features")
    return {
        name: toy.make_features(root / name, pairs, seed, teacher=name, width=width, dtype="float32")
        for seed, (name, width) in enumerate((("narrow", WIDTH), ("wide", 20)))
    }


def stored(features, tower) -> np.ndarray:
    """All stored vectors of a tower, over views or captions, float64 `[n, width]`."""
    count = features.manifest["pairs"]["rows"]
    blocks = range(-(-count // features.manifest["block"]))
    parts = [getattr(features.blocks.read(i), tower).reshape(-1, features.width) for i in blocks]
    return np.concatenate(parts).astype(np.float64)


def mapped(kind, features, tower) -> np.ndarray:
    return np.asarray(maps.fit(kind, features).apply(tower, jnp.asarray(stored(features, tower), jnp.float32)))


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 48, 128, 384, 512, 640, 768, 1024])
def test_hadamard_matrices_are_orthogonal_with_entries_of_one_size(n):
    matrix = hadamard(n)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(n), atol=1e-10)
    np.testing.assert_allclose(np.abs(matrix), n**-0.5)
    if n & (n - 1) == 0:
        assert np.linalg.matrix_rank(scipy.linalg.hadamard(n)) == n  # scipy's, of powers of two only


@pytest.mark.parametrize("n", [3, 6, 10, 36])
def test_a_width_without_a_matrix_is_refused(n):
    with pytest.raises(InputError, match=f"no Hadamard matrix of width {n}"):
        hadamard(n)


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("name", ["narrow", "wide"])
def test_phi_s_has_variance_one_everywhere_and_keeps_the_ratios_of_distances(features, name, tower):
    x = stored(features[name], tower)
    y = mapped("phi_s", features[name], tower).astype(np.float64)
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(y.var(0), 1, atol=2e-5)  # in every dimension, and so on average
    ratios = np.linalg.norm(y[1:] - y[:-1], axis=1) / np.linalg.norm(x[1:] - x[:-1], axis=1)
    np.testing.assert_allclose(ratios, ratios[0], rtol=2e-5)
    one = maps.fit("phi_s", features[name])
    back = y @ np.linalg.inv(one.matrix[tower].astype(np.float64)) + one.shift[tower]
    np.testing.assert_allclose(back, x, atol=1e-5)


def test_the_other_kinds_do_not_have_what_phi_s_has(features):
    """Negative controls: neither centring nor standardising gives both; whitening loses distances."""
    x = stored(features["wide"], "image")
    distances = np.linalg.norm(x[1:] - x[:-1], axis=1)
    for kind, variances, ratios in (("centre", False, None), ("standardise", True, False), ("whiten", True, False)):
        y = mapped(kind, features["wide"], "image").astype(np.float64)
        assert (np.abs(y.var(0) - 1).max() < 1e-3) == variances, kind
        if ratios is not None:
            assert np.ptp(np.linalg.norm(y[1:] - y[:-1], axis=1) / distances) > 1e-2, kind


def test_the_kinds_are_what_they_say(features):
    one = features["narrow"]
    for tower in ("image", "text"):
        x = stored(one, tower)
        centred = x - x.mean(0)
        unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
        np.testing.assert_array_equal(mapped("identity", one, tower), x.astype(np.float32))
        np.testing.assert_allclose(mapped("unit", one, tower), unit(x), atol=1e-6)
        np.testing.assert_allclose(mapped("centre", one, tower), unit(centred), atol=1e-5)
        np.testing.assert_allclose(mapped("standardise", one, tower), centred / x.std(0), rtol=1e-4, atol=1e-5)
        whitened = mapped("whiten", one, tower).astype(np.float64)
        np.testing.assert_allclose(whitened.T @ whitened / len(x), np.eye(WIDTH), atol=1e-4)
        root = scipy.linalg.sqrtm(np.cov(x.T, bias=True))
        np.testing.assert_allclose(whitened, centred @ np.linalg.inv(root), rtol=1e-3, atol=1e-4)


def test_a_direction_without_variance_stays_finite(pairs, tmp_path):
    writer = toy.feature_writer(tmp_path / "flat", pairs, width=4, dtype="float32", norm="none")
    image, text = toy.feature_values(pairs, 4, 2)
    for shard in writer.pending():
        rows = writer.rows(shard)
        here = slice(rows.start, rows.stop)
        flat = [np.concatenate([t[:, :3], np.ones((len(t), 1), np.float32)], 1) for t in text[here]]
        still = np.concatenate([image[here][..., :3], np.ones((*image[here].shape[:2], 1), np.float32)], -1)
        writer.write_shard(shard, np.ones(len(rows), bool), still, flat)
    writer.finish()
    stuck = maps.FeatureSet.open(tmp_path / "flat", pairs)
    for kind in ("standardise", "phi_s", "whiten"):
        assert np.isfinite(mapped(kind, stuck, "image")).all(), kind


def test_a_map_comes_back_from_its_file_and_damage_is_named(features, tmp_path):
    one = maps.fit("phi_s", features["narrow"])
    one.save(tmp_path / "map.npz")
    again = maps.TargetMap.load(tmp_path / "map.npz")
    assert (again.hash, again.kind, again.width, again.out) == (one.hash, "phi_s", WIDTH, WIDTH)
    assert again.features == features["narrow"].hash
    np.testing.assert_array_equal(again.matrix["text"], one.matrix["text"])
    assert maps.fit("phi_s", features["wide"]).hash != one.hash
    assert maps.fit("whiten", features["narrow"]).hash != one.hash
    data = bytearray((tmp_path / "map.npz").read_bytes())
    place = bytes(data).index(one.matrix["image"].tobytes()) + 5
    data[place] ^= 1
    (tmp_path / "flipped.npz").write_bytes(data)
    (tmp_path / "rows.npz").write_bytes(b"PK")
    for name, says in (("flipped", "damaged|does not have the hash"), ("rows", "damaged"), ("none", "does not exist")):
        with pytest.raises(InputError, match=says):
            maps.TargetMap.load(tmp_path / f"{name}.npz")
    with pytest.raises(InputError, match=r"unknown target map 'phis'.*phi_s"):
        maps.fit("phis", features["narrow"])


def test_the_auto_encoder_is_the_authors(features):
    """Loss and gradients against the same network in torch, without noise and dropout."""
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    widths = {name: one.width for name, one in features.items()}
    params = autoencoder.init(jax.random.key(3), widths, 8, 10)
    inputs = {
        n: {t: jnp.asarray(stored(f, t)[:9], jnp.float32) for t in ("image", "text")} for n, f in features.items()
    }
    value, gradients = jax.value_and_grad(autoencoder.loss)(params, inputs, None)
    tensors = jax.tree.map(lambda x: torch.tensor(np.asarray(x), requires_grad=True), params)

    def through(dense, x):
        return x @ dense["kernel"] + dense["bias"]

    errors = []
    for name, towers in inputs.items():
        for tower, x in towers.items():
            x = torch.tensor(np.asarray(x))
            hidden = through(tensors["teachers"][name]["in"], x)
            for layer in tensors["shared"][tower]["encoder"]:
                hidden = torch.relu(through(layer, hidden))
            first, last = tensors["shared"][tower]["decoder"]
            hidden = through(last, torch.relu(through(first, hidden)))
            errors.append(((through(tensors["teachers"][name]["out"], hidden) - x) ** 2).mean())
    reference = torch.stack(errors).mean()
    reference.backward()
    np.testing.assert_allclose(value, reference.item(), rtol=1e-6)
    for mine, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(tensors), strict=True):
        np.testing.assert_allclose(mine, theirs.grad.numpy(), rtol=1e-4, atol=1e-7)
    noisy = autoencoder.loss(params, inputs, jax.random.key(0))
    assert abs(noisy - value) > 1e-4 * value  # noise and dropout are there when they should be


def test_trained_maps_are_affine_shared_by_the_towers_and_reproducible(features, quick_compilation):
    sizes = {"latent": 6, "hidden": 8, "batch": 16, "steps": 60}
    fitted = autoencoder.fit(features, seed=1, lr=1e-2, **sizes)
    variance = np.mean([stored(f, t).var(0).mean() for f in features.values() for t in ("image", "text")])
    for name, one in fitted.items():
        assert (one.kind, one.width, one.out, one.unit) == ("autoencoder", features[name].width, 6, False)
        np.testing.assert_array_equal(one.matrix["image"], one.matrix["text"])
        assert one.made["loss"] < 1.2 * variance  # random weights start at 2 or more
        x = stored(features[name], "image").astype(np.float32)
        np.testing.assert_allclose(one.apply("image", x), x @ one.matrix["image"] + one.offset["image"], atol=1e-5)
    again = autoencoder.fit(features, seed=1, lr=1e-2, **sizes)
    assert [again[n].hash for n in again] == [fitted[n].hash for n in fitted]


def test_command(features, tmp_path, capsys):
    root, out = str(features["wide"].path.parent), tmp_path / "maps"
    assert cli.main(["features", "map", root, "--kind", "standardise", "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in printed] == [["narrow", "standardise"], ["wide", "standardise"]]
    assert maps.TargetMap.load(out / "wide.npz").hash == maps.fit("standardise", features["wide"]).hash
    for arguments, says in (
        (["--kind", "standardise", "--out", str(out)], "exists; choose another folder"),
        (["--kind", "standardize", "--out", str(tmp_path / "new")], "did you mean 'standardise'"),
        (["--kind", "autoencoder", "--out", str(tmp_path / "new"), "--width", "0"], "must be positive"),
    ):
        assert cli.main(["features", "map", root, *arguments]) == 2
        complaint = capsys.readouterr().err
        assert says in complaint
        assert complaint.count("\n") == 1
        assert not (tmp_path / "new").exists()
