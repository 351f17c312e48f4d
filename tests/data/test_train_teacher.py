"""Training a teacher: the same run however images and devices are held; files; bad input."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

from ait_jax.data import sources
from ait_jax.data.image_folder import Undecoded
from ait_jax.data.teacher_training import _augmented, train_teacher
from ait_jax.errors import UserError
from ait_jax.run.checkpoint import Checkpoints
from ait_jax.teacher import load_teacher
from configs.quickstart import get_config
from experiments.train_teacher import _measured_on, train_to_file
from tests.conftest import shared
from tests.support.program import HANGS, ROOT
from tests.support.small_teacher import GREY, Small, small_images, small_training

QUICKSTART = "configs/quickstart.py"


@pytest.fixture(scope="module")
def whole():
    """An undisturbed training of `small_training` with seed 1."""
    return train_teacher(Small(), small_images(), GREY, small_training(), 1)


def assert_equal_trees(got, wanted, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    compare = np.testing.assert_allclose if tolerance else np.testing.assert_array_equal
    jax.tree.map(lambda a, b: compare(a, b, **tolerance), got, wanted)


# The training -------------------------------------------------------------------------------------


def test_a_training_is_plain_sgd_on_the_images_drawn(whole):
    """Against the same steps written plainly: one device, no axes, images cropped by numpy."""
    training, images, model = small_training(), small_images(), Small()
    init_key, run_key = jax.random.split(jax.random.key(1))
    variables = jax.jit(model.init)(init_key, jnp.zeros((1, 6, 5, 1)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 1, 12)
    tx = optax.chain(
        optax.add_decayed_weights(training.weight_decay),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )

    @jax.jit
    def update(variables, opt_state, pixels, labels):
        def loss_fn(params):
            logits, updated = model.apply(
                {**variables, "params": params}, GREY(pixels), True, mutable=["batch_stats"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, updated["batch_stats"]

        grads, stats = jax.grad(loss_fn, has_aux=True)(variables["params"])
        updates, opt_state = tx.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": stats}, opt_state

    opt_state = tx.init(variables["params"])
    for step in range(12):
        keys = jax.random.split(jax.random.fold_in(run_key, step), 3)
        chosen = np.asarray(jax.random.randint(keys[0], (8,), 0, 20))
        corners = np.asarray(jax.random.randint(keys[1], (8, 2), 0, 3))  # moved by -1, 0 or 1
        mirrored = np.asarray(jax.random.bernoulli(keys[2], shape=(8,)))
        batch = []
        for i, (top, left), mirror in zip(chosen, corners, mirrored):
            image = np.pad(images.images[i], ((1, 1), (1, 1), (0, 0)), mode="edge")
            image = image[top : top + 6, left : left + 5]
            batch.append(image[:, ::-1] if mirror else image)
        variables, opt_state = update(variables, opt_state, np.stack(batch), images.labels[chosen])
    assert_equal_trees(whole, jax.device_get(variables), rtol=1e-3, atol=1e-5)


def test_images_that_are_not_kept_give_the_same_run(whole):
    images = small_images()
    lazy = Undecoded(images.images.__getitem__, images.images.shape)
    got = train_teacher(Small(), images._replace(images=lazy), GREY, small_training(), 1)
    assert_equal_trees(got, whole)


def test_an_interrupted_training_goes_on_to_the_same_result(whole, tmp_path):
    images, training = small_images(), small_training()
    calls = []

    def breaks(i):
        calls.append(i)
        if len(calls) > 8 * 9:
            raise sources.DataError("the disk is gone")
        return images.images[i]

    lazy = images._replace(images=Undecoded(breaks, images.images.shape))
    checkpoints = Checkpoints(tmp_path, keep=1)
    with pytest.raises(sources.DataError, match="the disk is gone"):
        train_teacher(Small(), lazy, GREY, training, 1, checkpoints)
    checkpoints.close()
    again = Checkpoints(tmp_path, keep=1)
    assert 0 < again.latest_step() < 12
    calls.clear()
    assert_equal_trees(train_teacher(Small(), lazy, GREY, training, 1, again), whole)
    assert len(calls) < 8 * 9
    again.close()


def test_a_loss_that_is_not_finite_names_its_step():
    with pytest.raises(UserError, match=r"loss became (nan|inf) at step \d: lower teacher\.train"):
        train_teacher(Small(), small_images(), GREY, small_training(learning_rate=1e38), 0)


@pytest.mark.parametrize("flip", [False, True])
def test_augmented_images_are_moved_and_perhaps_mirrored(flip):
    images = np.random.default_rng(0).integers(0, 256, (64, 16, 9, 3), dtype=np.uint8)
    keys = jax.random.split(jax.random.key(0), 3)
    got = np.asarray(_augmented(keys, jnp.asarray(images), np.arange(64), 64, flip=flip))
    assert got.dtype == np.uint8
    seen = set()
    for image, result in zip(images, got):
        padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
        ways = [
            (top, left, mirror)
            for top in range(3)
            for left in range(3)
            for mirror in (False, True)
            if np.array_equal(
                padded[top : top + 16, left : left + 9, :][:, :: 1 - 2 * mirror], result
            )
        ]
        assert len(ways) == 1
        seen |= set(ways)
    assert {mirror for *_, mirror in seen} == ({False, True} if flip else {False})
    assert len(seen) >= 9
    # The places in the global batch decide, not the device.
    part = np.asarray(_augmented(keys, jnp.asarray(images[40:]), np.arange(40, 64), 64, flip=flip))
    np.testing.assert_array_equal(part, got[40:])


SCRIPT = """
import sys
import jax, numpy as np
from safetensors.numpy import save_file
import flax.traverse_util
from ait_jax.errors import UserError
from ait_jax.data.teacher_training import train_teacher
from tests.support.small_teacher import GREY, Small, small_images, small_training

assert jax.device_count() == 4
variables = train_teacher(Small(), small_images(), GREY, small_training(), 1)
save_file(flax.traverse_util.flatten_dict(variables, sep="/"), sys.argv[1])
try:
    train_teacher(Small(), small_images(), GREY, small_training(batch_size=6), 1)
except UserError as error:
    print(error)
"""


def test_four_devices_make_the_same_run(whole, tmp_path):
    import flax.traverse_util
    from safetensors.numpy import load_file

    file = tmp_path / "variables.safetensors"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file)],
        env=os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=HANGS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "teacher.training.batch_size = 6 is not allowed" in done.stdout
    many = flax.traverse_util.unflatten_dict(load_file(file), sep="/")
    assert_equal_trees(many, whole, rtol=1e-3, atol=1e-5)


# Files --------------------------------------------------------------------------------------------


def write_folder(folder, classes=("dark", "light", "striped"), each=6, seed=0):
    """PNGs of three kinds, 12 x 10 or larger."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(each):
            pixels = rng.integers(0, 90, (12, 10 + i % 3, 3))
            pixels += np.array([0, 160, 0])[label]
            pixels[:: 2 if label == 2 else 12] += 80
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return f"folder:{folder}"


def folder_config(name):
    config = get_config()
    config.data.name = name
    config.teacher.update(
        {"image_shape": (8, 8, 3), "num_classes": 3, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    )
    config.teacher.preprocess.resize = 9
    config.teacher.training.update({"steps": 40, "batch_size": 12, "flip": True})
    config.data.batch_size = 7
    return config


def test_a_folder_makes_a_teacher(tmp_path):
    config = folder_config(write_folder(tmp_path / "train"))
    evaluated = write_folder(tmp_path / "val", each=4, seed=1)
    out = tmp_path / "net.safetensors"
    record = train_to_file(config, out, eval_data=evaluated)
    assert record == json.loads(json.dumps(record)) | {"teacher": record["teacher"]}
    assert record["top1"] >= 90 and record["evaluated_on"] == evaluated
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "net.json", "net.safetensors", "train", "val"
    ]  # fmt: skip
    # What the record says of the teacher is what a config needs.
    written = json.loads((tmp_path / "net.json").read_text())
    again = get_config()
    for key in ("arch", "weights", "num_classes"):
        again.teacher[key] = written["teacher"][key]
    for key in ("image_shape", "mean", "std"):
        again.teacher[key] = tuple(written["teacher"][key])
    teacher = load_teacher(again, out)
    assert teacher.fingerprint == written["fingerprint"]
    images = sources.load_images(evaluated, "", "", fit=sources.Fit((8, 8, 3), 9))
    logits = teacher.model.apply(teacher.variables, teacher.preprocess(images.images))
    right = np.mean(np.argmax(logits, -1) == images.labels)
    assert 100 * right == pytest.approx(written["top1"])
    with pytest.raises(UserError, match="that file exists already"):
        train_to_file(config, out)


def test_what_is_measured_on():
    config = get_config()
    assert _measured_on(config, None, None) == ("digits", "test")
    assert _measured_on(config, None, "train") == ("digits", "train")
    assert _measured_on(config, "folder:val", None) == ("folder:val", "test")
    # The training data says nothing, unless it is asked for.
    config.data.split = "train"
    assert _measured_on(config, None, None) is None
    assert _measured_on(config, "digits", None) == ("digits", "train")
    config.data.name = "folder:train"
    config.data.split = "test"
    assert _measured_on(config, None, None) is None
    assert _measured_on(config, "folder:train", None) == ("folder:train", "test")


def refused(tmp_path, config, *parts, out="new.safetensors", **evaluation):
    """One line that names everything, and nothing begun."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as caught:
        train_to_file(config, tmp_path / out, **evaluation)
    assert len(str(caught.value).splitlines()) == 1
    for part in parts:
        assert part in str(caught.value), caught.value
    assert sorted(tmp_path.rglob("*")) == before


def test_files_that_cannot_be_written(tmp_path):
    for out in ("net.pth", "net"):
        refused(tmp_path, get_config(), "--out = ", out, "end in .safetensors", out=out)
    refused(tmp_path, get_config(), "--out = ", "a folder", out="none/net.safetensors")


def test_data_that_does_not_fit(tmp_path):
    config = get_config()
    config.data.name = "none"
    refused(tmp_path, config, "data.name = 'none'", "needs data")
    config = get_config()
    config.teacher.training.split = "validation"
    refused(tmp_path, config, "teacher.training.split = 'validation'", "'train' or 'test'")
    config = get_config()
    config.teacher.num_classes = 7
    refused(tmp_path, config, "training data", "10 classes", "teacher.num_classes = 7")
    config = get_config()
    config.teacher.image_shape = (9, 8, 1)
    refused(tmp_path, config, "training data", "image_shape = (9, 8, 1)", "8 x 8")
    refused(tmp_path, get_config(), "evaluation data", "'tset'", eval_split="tset")
    refused(tmp_path, get_config(), "evaluation data", "/no", eval_data="folder:/no")


def test_labels_outside_the_classes(tmp_path, monkeypatch):
    # A data set whose labels are plain numbers says nothing of its classes beforehand.
    digits = sources._digits_source
    monkeypatch.setattr(
        sources, "_digits_source", lambda split: digits(split)._replace(classes=None)
    )
    config = get_config()
    config.teacher.num_classes = 7
    refused(tmp_path, config, "training data", "label", "teacher.num_classes = 7 allows 0..6")


def test_folders_of_other_classes(tmp_path):
    config = folder_config(write_folder(tmp_path / "train"))
    fewer = write_folder(tmp_path / "fewer", classes=("dark", "light"))
    refused(tmp_path, config, "evaluation data", "2 class folders", "= 3", eval_data=fewer)
    other = write_folder(tmp_path / "other", classes=("bright", "dark", "light"))
    refused(tmp_path, config, "label 0 is class 'bright'", "'dark'", eval_data=other)
    config.teacher.preprocess.resize = 0
    config.teacher.image_shape = (12, 11, 3)
    refused(tmp_path, config, "training data", "smaller than teacher.image_shape = (12, 11, 3)")


def test_an_interrupted_training_of_other_settings(tmp_path):
    saved = tmp_path / "new.training"
    saved.mkdir()
    (saved / "settings.json").write_text("{}")
    refused(tmp_path, get_config(), str(saved), "other settings", "another --out")


def test_data_sets_of_tfds(tmp_path):
    config = get_config()
    config.data.name, config.data.dir = "cifar10", str(shared("data/tfds/cifar10").parent)
    config.teacher.update({"image_shape": (32, 32, 3), "mean": (0.5,) * 3, "std": (0.25,) * 3})
    refused(tmp_path, config, "teacher.training.split = 'train'", "no such prepared data set")
    # A teacher of CIFAR-100 would allow every label of CIFAR-10.
    config.teacher.training.split = "test[:5]"
    config.teacher.num_classes = 100
    refused(tmp_path, config, "data.name = 'cifar10' has 10 classes", "teacher.num_classes = 100")
    for split in ("test[:5]", "test[5:]"):
        images = sources.load_images("cifar10", config.data.dir, split, num_classes=10, keep_gib=0)
        assert images.classes[:2] == ("airplane", "automobile")


# The program --------------------------------------------------------------------------------------


def run(*args):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train_teacher", f"--config={QUICKSTART}", *args],
        cwd=ROOT, capture_output=True, text=True, timeout=HANGS, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_the_program(tmp_path):
    out = tmp_path / "net.safetensors"
    short = ("--config.teacher.training.steps=20", "--config.teacher.training.batch_size=16")
    code, printed, err = run(f"--out={out}", *short)
    assert code == 0, err
    assert "% on digits, test" in printed and str(out) in printed
    assert out.exists() and "teacher 20/20" in err
    # Again: one line that says why not.
    code, printed, err = run(f"--out={out}", *short)
    assert code == 2 and not printed
    (line,) = err.splitlines()
    assert line.startswith("error: --out") and "exists already" in line


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--config.teacher.arch=resnet19", "'resnet18', "),  # lists what there is
        ("--config.teacher.training.epochs=3", "epochs"),
    ],
)
def test_the_program_refuses_in_one_line(tmp_path, flag, part):
    code, _, err = run(f"--out={tmp_path}/net.safetensors", flag)
    assert code == 2 and part in err
    assert len(err.splitlines()) == 1 and err.startswith("error: ")
