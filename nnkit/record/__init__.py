"""A run told to a tracker of experiments: TensorBoard, MLflow, Weights & Biases, or one of your own."""

from nnkit.record.log import log_to
from nnkit.record.logger import Logger
from nnkit.record.mlflow import mlflow
from nnkit.record.tensorboard import tensorboard
from nnkit.record.wandb import wandb

__all__ = ["Logger", "log_to", "mlflow", "tensorboard", "wandb"]
