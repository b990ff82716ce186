"""The history of a run for TensorBoard, which need not be installed where training runs."""

import contextlib

import tensorflow as tf

from unet_fast.errors import UserError

_SCALARS = tf.compat.v1.SummaryMetadata(
    plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars"), data_class="DATA_CLASS_SCALAR"
)


class TensorBoard:
    """Writes lines of a history as scalars, which TensorBoard shows as curves over the steps.

    Args:
        path: folder to write to, made if need be. A file is added to those that are there.

    Raises:
        UserError: it cannot be written to.

    >>> import os, tempfile
    >>> from unet_fast.tensorboard import TensorBoard
    >>> folder = tempfile.mkdtemp()
    >>> TensorBoard(folder)({"step": 100, "loss": 0.7, "loss_scale": None})
    >>> len(os.listdir(folder))
    1
    """

    def __init__(self, path):
        self._path = path
        with tf.device("CPU:0"), self._told():
            self._writer = tf.summary.create_file_writer(str(path))

    def __call__(self, row):
        """Write one line: a dict of numbers by their names, and "step"; None is left out."""
        with tf.device("CPU:0"), self._told(), self._writer.as_default(step=row["step"]):
            for name, value in row.items():
                if name != "step" and value is not None:
                    tf.summary.write(name, tf.constant(value, tf.float32), metadata=_SCALARS)
            self._writer.flush()

    @contextlib.contextmanager
    def _told(self):
        try:
            yield
        except tf.errors.OpError as error:
            raise UserError(f"{self._path}: cannot write there ({error.message}); leave out --tensorboard") from error
