"""Writes checkpoints of the other side, without unet_fast: python foreign_checkpoints.py FOLDER.

FOLDER receives image.npy [1, 188, 188, 1] and, for each of these, the logits that its own graph gives, NAME.npy:

    tf1, tf1-prefix  TensorFlow 1 graphs, the second in the scope UNet, trained a step with Momentum and Adam
    tf2              a checkpoint of objects with UNet_Medical's attribute names, and of an optimizer
    keras            the network of stock Keras layers: .keras, .h5 and .weights.h5; same.keras with padding same
    other            .keras with the same shapes and ELU in place of ReLU
"""

import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import tensorflow as tf

FILTERS, DEPTH, CLASSES, SIZE = 2, 4, 3, 188
rng = np.random.default_rng(0)


def forward(image, conv, transpose, pool, crop_concat):
    """The network, by functions of (tensor, filters, kernel size)."""
    x, skips = image, []
    for level in range(DEPTH):
        x = conv(conv(x, FILTERS << level, 3), FILTERS << level, 3)
        skips.append(x)
        x = pool(x)
    x = conv(conv(x, FILTERS << DEPTH, 3), FILTERS << DEPTH, 3)
    for level in reversed(range(DEPTH)):
        x = transpose(x, FILTERS << level, 3)
        x = crop_concat(x, skips[level])
        x = conv(conv(x, FILTERS << level, 3), FILTERS << level, 3)
    return conv(x, CLASSES, 1)


def crop_concat(x, skip):
    margin = (skip.shape[1] - x.shape[1]) // 2
    return tf.concat([x, skip[:, margin : margin + x.shape[1], margin : margin + x.shape[2]]], -1)


def pool(x):
    return tf.nn.max_pool2d(x, 2, 2, "VALID")


def initial(shape):
    return rng.normal(0, 1.2 / np.sqrt(np.prod(shape[:-1])), shape).astype(np.float32)


def tensorflow_1(folder, image, name, scope, optimizer):
    v1 = tf.compat.v1
    with tf.Graph().as_default(), v1.Session() as session, v1.variable_scope(scope or v1.get_variable_scope()):
        made = {"conv2d": 0, "conv2d_transpose": 0}

        def layer(kind, kernel_shape, filters, compute):
            number, made[kind] = made[kind], made[kind] + 1
            with v1.variable_scope(f"{kind}_{number}" if number else kind):
                kernel = v1.get_variable("kernel", initializer=initial(kernel_shape))
                bias = v1.get_variable("bias", initializer=initial([filters]))
                return compute(kernel) + bias

        def conv(x, filters, k):
            y = layer("conv2d", [k, k, x.shape[-1], filters], filters, lambda w: tf.nn.conv2d(x, w, 1, "VALID"))
            return y if k == 1 else tf.nn.relu(y)

        def transpose(x, filters, k):
            shape = [1, 2 * x.shape[1], 2 * x.shape[2], filters]
            return tf.nn.relu(
                layer(
                    "conv2d_transpose",
                    [k, k, filters, x.shape[-1]],
                    filters,
                    lambda w: tf.nn.conv2d_transpose(x, w, shape, 2, "SAME"),
                )
            )

        x = v1.placeholder(tf.float32, image.shape)
        logits = forward(x, conv, transpose, pool, crop_concat)
        step = v1.train.get_or_create_global_step()
        train = optimizer.minimize(tf.reduce_mean(logits**2), global_step=step)
        session.run(v1.global_variables_initializer())
        session.run(train, {x: image})
        (folder / name).mkdir()
        v1.train.Saver().save(session, str(folder / name / "model.ckpt"), global_step=step)
        np.save(folder / f"{name}.npy", session.run(logits, {x: image}))


class Convolution(tf.Module):
    def __init__(self, kernel_shape, filters):
        super().__init__()
        self.kernel, self.bias = tf.Variable(initial(kernel_shape)), tf.Variable(initial([filters]))


class Block(tf.Module):
    pass


class UNet(tf.Module):
    """Made in the order in which it runs; a block ends in the upsampling for the next."""

    def __init__(self):
        super().__init__()
        self.input_block, self.bottleneck, self.output_block = Block(), Block(), Block()
        self.down_blocks, self.up_blocks = [Block() for _ in range(3)], [Block() for _ in range(3)]
        self.blocks = [self.input_block, *self.down_blocks, self.bottleneck, *self.up_blocks, self.output_block]

    def __call__(self, image):
        calls = []  # the block and the attribute of each convolution
        for block in self.blocks:
            calls += [(block, "conv1"), (block, "conv2")]
            if block in (self.bottleneck, *self.up_blocks):
                calls.append((block, "conv_transpose"))
        calls.append((self.output_block, "conv3"))
        calls = iter(calls)

        def layer(shape, filters):
            block, attribute = next(calls)
            if not hasattr(block, attribute):
                setattr(block, attribute, Convolution(shape, filters))
            return getattr(block, attribute)

        def conv(x, filters, k):
            own = layer([k, k, x.shape[-1], filters], filters)
            y = tf.nn.conv2d(x, own.kernel, 1, "VALID") + own.bias
            return y if k == 1 else tf.nn.relu(y)

        def transpose(x, filters, k):
            own = layer([k, k, filters, x.shape[-1]], filters)
            shape = [1, 2 * x.shape[1], 2 * x.shape[2], filters]
            return tf.nn.relu(tf.nn.conv2d_transpose(x, own.kernel, shape, 2, "SAME") + own.bias)

        return forward(image, conv, transpose, pool, crop_concat)


def tensorflow_2(folder, image):
    model, optimizer = UNet(), tf.compat.v1.train.AdamOptimizer(1e-3)
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(tf.constant(image)) ** 2)
    variables = model.trainable_variables
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
    del model.blocks  # the checkpoint knows blocks by their own names
    tf.train.Checkpoint(model=model, optimizer=optimizer).save(folder / "tf2" / "checkpoint")
    model.blocks = [model.input_block, *model.down_blocks, model.bottleneck, *model.up_blocks, model.output_block]
    np.save(folder / "tf2.npy", model(tf.constant(image)))


def keras_model(padding, activation="relu", softmax=None):
    keras.utils.clear_session()
    keras.utils.set_random_seed(1)
    layers = keras.layers

    def conv(x, filters, k):
        options = {"activation": softmax} if k == 1 else {"activation": activation, "padding": padding}
        return layers.Conv2D(filters, k, bias_initializer="normal", **options)(x)

    def transpose(x, filters, k):
        return layers.Conv2DTranspose(filters, k, strides=2, padding="same", activation=activation)(x)

    def join(x, skip):
        margin = (skip.shape[1] - x.shape[1]) // 2
        return layers.Concatenate()([x, layers.Cropping2D(margin)(skip) if margin else skip])

    size = SIZE if padding == "valid" else 64
    x = keras.Input((size, size, 1))
    return keras.Model(x, forward(x, conv, transpose, lambda x: layers.MaxPooling2D()(x), join))


def stock_keras(folder, image):
    model = keras_model("valid")
    for suffix in ("keras", "h5", "weights.h5"):
        (model.save_weights if "weights" in suffix else model.save)(folder / f"keras.{suffix}")
    with h5py.File(folder / "keras2.h5", "w") as file:  # weights alone, as Keras 2 laid them out
        named = [layer for layer in model.layers if layer.weights]
        file.attrs["layer_names"] = [layer.name.encode() for layer in named]
        for layer in named:
            group = file.create_group(layer.name)
            names = [f"{layer.name}/{v.name}:0" for v in layer.weights]
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, v in zip(names, layer.weights, strict=True):
                group[name] = np.asarray(v)
    np.save(folder / "keras.npy", model(image))
    same = keras_model("same", softmax="softmax")
    same.save(folder / "same.keras")
    np.save(folder / "same.npy", same(image[:, :64, :64]))
    keras_model("valid", activation="elu").save(folder / "other.keras")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    image = rng.uniform(-1, 1, (1, SIZE, SIZE, 1)).astype(np.float32)
    np.save(folder / "image.npy", image)
    tensorflow_1(folder, image, "tf1", "", tf.compat.v1.train.MomentumOptimizer(1e-3, 0.9))
    tensorflow_1(folder, image, "tf1-prefix", "UNet", tf.compat.v1.train.AdamOptimizer(1e-3))
    tensorflow_2(folder, image)
    stock_keras(folder, image)
    assert "unet_fast" not in sys.modules
