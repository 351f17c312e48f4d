"""Whole iterations recorded from the original implementation, and the same made by our step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ait_jax.convert.weights import load_variables
from ait_jax.methods.phases import Phase, Plan
from ait_jax.models import build_model
from ait_jax.quant.linen import QuantizedModel
from ait_jax.quant.policy import leaf_name
from ait_jax.quant.ranges import fixed_ranges
from ait_jax.training.state import Frozen, init_state
from ait_jax.training.step import StepBuilder
from tests.conftest import shared
from tests.support.golden_variables import RESNET20_KERNELS, trunk_variables
from tests.support.policies import policy_for

FRACTION = 1e-3
ITERATIONS = 3
BATCH = 16
NOISE = 1e-7  # Relative, the size of float32's rounding.
IMAGE_SHAPE = (32, 32, 3)
STUDENT = Phase("student", ITERATIONS, generator=True, student=True)


class RecordedSampler:
    """A generator with the recorded random inputs, the latents shaken by float noise."""

    def __init__(self, generator, batches, noise):
        self.init, self.apply = generator.init, generator.apply
        self.targets = generator.targets
        self.batches = jax.tree.map(lambda *arrays: jnp.stack(arrays), *batches)
        self.noise = noise

    def sample(self, key, step, example_ids):
        batch = jax.tree.map(lambda x: x[step], self.batches)
        shake = 1 + self.noise * jax.random.normal(key, batch.latent.shape)
        return batch._replace(latent=batch.latent * shake)


def recorded_alphas(golden):
    """Applies the alphas of the recorded run instead of searching for them."""
    alphas = jnp.asarray(golden["alphas"], jnp.float32)

    def update(updates, count, params=None):
        def scale(path, u):
            name = leaf_name(path)
            kernel = name.endswith("kernel")
            return u * alphas[count, RESNET20_KERNELS.index(name)] if kernel else u

        return jax.tree_util.tree_map_with_path(scale, updates), count + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


class Trace:
    """Three recorded iterations, and the same made by our step.

    Attributes:
        golden: the recorded arrays.
        recorded: losses [iterations, (generator, student)].
        teacher: its variables, with which the student starts.
        policy: the student's bits.
    """

    def __init__(self, name, generator, batch_of):
        """Reads a trace.

        Args:
            name: of the file.
            generator: of the trace's framework.
            batch_of: makes the generator's batch of the recorded arrays of one iteration.
        """
        self.golden = np.load(shared(f"golden/{name}.npz"))
        weights = shared("data/weights/resnet20_cifar10.th")
        self._model = build_model("cifar_resnet20_a", 10)
        image = jnp.ones((1, *IMAGE_SHAPE))
        shapes = jax.eval_shape(self._model.init, jax.random.key(0), image)
        variables = load_variables(weights, "cifar_resnet20_a", shapes)
        self.teacher = jax.tree.map(jnp.asarray, variables)
        self.policy = policy_for(self._model, self.teacher, IMAGE_SHAPE)
        self._quantized = QuantizedModel(self._model, self.policy, self.teacher, IMAGE_SHAPE)
        self._generator = generator
        iterations = [self._iteration(i) for i in range(ITERATIONS)]
        self._batches = [batch_of(arrays) for arrays in iterations]
        self.recorded = np.asarray(
            [(arrays["loss_generator"], arrays["loss_student"]) for arrays in iterations]
        )

    def _iteration(self, i):
        """The recorded arrays of one iteration."""
        prefix = f"it{i}/"
        return {
            name.removeprefix(prefix): self.golden[name]
            for name in self.golden.files
            if name.startswith(prefix)
        }

    def compiled(self, student_scaling):
        """Our step as a function that runs it, compiled once.

        Args:
            student_scaling: what comes after the student's SGD.

        Returns:
            `run(seed=0, iterations=3, tolerance=inf)`, which returns losses [iterations,
            (generator, student)], the last iteration's metrics, and the last state. Seed 0 is the
            undisturbed run, others shake the latents by float noise. A run ends after the iteration
            in which a loss strays by more than the relative tolerance.
        """
        generator_tx = optax.adam(1e-3, 0.5, 0.999)
        student_tx = optax.chain(optax.sgd(1e-4, 0.9, nesterov=True), student_scaling)
        frozen = Frozen(self.teacher, jax.random.key(0))
        start = init_state(frozen, self._generator, self._quantized, generator_tx, student_tx)
        variables = trunk_variables(self.golden, "generator0/", IMAGE_SHAPE[0])
        bounds = self.golden["activation_ranges"]
        start = start._replace(
            generator=variables,
            generator_opt=generator_tx.init(variables["params"]),
            ranges=fixed_ranges(bounds[:, 0], bounds[:, 1]),
        )

        @jax.jit
        def step(state, frozen, noise):
            builder = StepBuilder(
                self._model,
                self._quantized,
                RecordedSampler(self._generator, self._batches, noise),
                generator_tx,
                student_tx,
                optax.constant_schedule(FRACTION),
                Plan((STUDENT,)),
            )
            whole = builder.build(STUDENT, calibrate=False, axis_name=None)
            return whole(state, frozen, jnp.arange(BATCH))

        def run(seed=0, iterations=ITERATIONS, tolerance=np.inf):
            frozen = Frozen(self.teacher, jax.random.key(seed))
            state, losses = start, []
            for recorded in self.recorded[:iterations]:
                state, metrics = step(state, frozen, NOISE if seed else 0.0)
                losses.append((float(metrics["generator/loss"]), float(metrics["student/loss"])))
                if np.abs(losses[-1] / recorded - 1).max() > tolerance:
                    break
            return np.asarray(losses), metrics, state

        return run
