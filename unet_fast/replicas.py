"""Steps of several replicas, each with a model, an optimizer and compiled programs of its own; `distribution` says how."""

import itertools

import keras
import numpy as np
import tensorflow as tf

from unet_fast.step_loop import BlockSteps, StepLoop, loss_and_gradients

_GROUP = 0x756E6574  # a number for the replicas of a process, unlike those that TensorFlow's strategies count up from 1


class _Replica:
    """A device's model and optimizer, and the compiled programs of its step; `compile` makes them.

    Attributes:
        steps: its `BlockSteps`.
        step: of a block, images, masks, rows [S, B] and draws [S, B, D]: takes its next step, and keeps the replica's own
            loss. Only on GPUs of one process, of which XLA's own all-reduce is within the program.
        gradients: of a block: float32 [P + 1], the replica's share of the mean gradient of all variables, and its loss.
        apply: of the sum of that over all replicas: updates the variables.
    """

    def __init__(self, number, position, device, model, optimizer):
        self.number, self.position, self.device = number, position, device
        self.model, self.optimizer = model, optimizer
        self.steps = BlockSteps(device)

    def copy(self, number, position, device):
        """The same on another device."""
        with tf.device(device):
            model = type(self.model).from_config(self.model.get_config())
            model.jit_compile = self.model.jit_compile
            optimizer = keras.optimizers.deserialize(keras.optimizers.serialize(self.optimizer))
            optimizer.build(model.trainable_variables)
        other = _Replica(number, position, device, model, optimizer)
        for ours, theirs in zip(other.variables, self.variables, strict=True):
            ours.assign(np.asarray(theirs))
        return other

    @property
    def variables(self):
        return [*self.model.variables, *self.optimizer.variables]

    def drop_out_differently(self):
        """Gives the replica a dropout of its own, which follows from the first replica's and its number."""
        for variable in self.model.non_trainable_variables:
            if variable.path.endswith("seed_generator_state"):
                seed, count = np.asarray(variable)
                variable.assign(np.array([seed + self.number, count], variable.dtype))

    def compile(self, loss_fn, batches, accumulate, replicas, block, in_one_program):
        """Traces the programs outside of the strategy, under which Keras would see to the distribution itself."""
        jit = self.model.jit_compile
        variables = self.model.trainable_variables
        compute = loss_and_gradients(self.model, self.optimizer, loss_fn, batches, accumulate, replicas)

        # Gradients of float16 weights are float16 numbers, and so sent in half the time, unless they are already means.
        sent = self.model.compute_dtype if accumulate == 1 else "float32"

        def of_block(images, masks, rows, draws):
            loss, computed = compute(images, masks, *self.steps.take(rows, draws))
            return [*(tf.cast(gradient, tf.float32) for gradient in computed), loss]

        def update(means, loss):
            self.optimizer.apply(means, variables)
            self.steps.record(loss)

        @tf.function(jit_compile=jit, autograph=False)
        def step(*block):
            *computed, loss = of_block(*block)  # the loss is not summed: see docs/performance.md
            means = [_sum_in_program(tf.cast(each, sent), key, replicas) for key, each in enumerate(computed)]
            update([tf.cast(mean, tf.float32) for mean in means], loss)

        @tf.function(jit_compile=jit, autograph=False)
        def gradients(*block):
            return tf.concat([tf.reshape(each, [-1]) for each in of_block(*block)], 0)

        @tf.function(jit_compile=jit, autograph=False)
        def apply(packed):
            shapes = [*(v.shape for v in variables), tf.TensorShape([])]
            parts = tf.split(packed, [shape.num_elements() for shape in shapes])
            *means, loss = (tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True))
            update(means, loss / replicas)

        with tf.device(self.device):
            if in_one_program:
                self.step = step.get_concrete_function(*block)
            else:
                self.gradients = gradients.get_concrete_function(*block)
                self.apply = apply.get_concrete_function(tf.TensorSpec(self.gradients.output_shapes, tf.float32))


def _sum_in_program(value, key, replicas):
    """The sum over all replicas' values of that key, by XLA where it compiles the program."""
    return tf.raw_ops.CollectiveReduceV2(
        input=value, group_size=replicas, group_key=_GROUP, instance_key=key, ordering_token=[], merge_op="Add",
        final_op="Id", communication_hint="nccl",
    )  # fmt: skip


class ReplicaLoop(StepLoop):
    """The steps of all replicas; its base has the chunks.

    Args:
        distribution: the `unet_fast.distribution.Distribution` whose replicas they are.
        strategy: its tf.distribute.Strategy.
        model, optimizer, loss_fn, batches, start_step, accumulate: as `Distribution.loop`.

    Attributes:
        replicas: list of the `_Replica`s of this process.
    """

    def __init__(self, distribution, strategy, model, optimizer, loss_fn, batches, start_step, accumulate):
        self._distribution = distribution
        numbers = strategy.experimental_distribute_values_from_function(lambda at: at.replica_id_in_sync_group)
        numbers = strategy.experimental_local_results(numbers)
        devices = strategy.extended.worker_devices
        replica = _Replica(numbers[0], 0, devices[0], model, optimizer)
        values = distribution.from_chief([np.asarray(v) for v in replica.variables])
        for variable, value in zip(replica.variables, values, strict=True):
            variable.assign(value)
        self.replicas = [replica, *(replica.copy(numbers[i], i, devices[i]) for i in range(1, len(devices)))]
        count = distribution.replicas
        streams = [batches.blocks(start_step, each.device, (each.number, count)) for each in self.replicas]
        first = [next(stream) for stream in streams]
        # XLA has no all-reduce between CPU devices, and knows of no other process.
        in_one_program = bool(model.jit_compile) and count == len(devices) and "GPU" in devices[0]
        for each, block in zip(self.replicas, first, strict=True):
            each.drop_out_differently()
            each.compile(loss_fn, batches, accumulate, count, block, in_one_program)
        self._optimizers = [each.optimizer for each in self.replicas]
        self._steps = [each.steps for each in self.replicas]
        self._step = _make_one_program_step(self.replicas) if in_one_program else _make_step(strategy, self.replicas)
        blocks = itertools.chain([first], zip(*streams, strict=True))
        self._blocks = (tuple(itertools.chain(*block)) for block in blocks)
        self._block, self._position, self._length = None, 0, 0
        self._chunk = 1

    def advance(self, most):
        self._chunk = self._distribution.gather(self._chunk)[0]  # all workers run equal chunks, of the chief's length
        return self._distribution.interruptibly(super().advance, most)

    def _losses(self, first, last):
        return np.mean([steps.losses(first, last) for steps in self._steps], 0).tolist()


def _make_one_program_step(replicas):
    """A tf.function of the blocks of all replicas, one after the other: their next step. It waits for none of them."""

    @tf.function(autograph=False)
    def step(*blocks):
        for replica in replicas:
            with tf.device(replica.device):
                replica.step(*blocks[4 * replica.position : 4 * replica.position + 4])

    return step


def _make_step(strategy, replicas):
    """As `_make_one_program_step`, by the strategy's all-reduce between two programs of a replica."""
    here = strategy.experimental_distribute_values_from_function(
        lambda at: replicas[at.replica_id_in_sync_group - replicas[0].number]
    )

    @tf.function(autograph=False)
    def step(*blocks):
        def run(replica):
            packed = replica.gradients(*blocks[4 * replica.position : 4 * replica.position + 4])
            replica.apply(tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, packed))

        strategy.run(run, args=(here,))

    return step
