"""Networks that are known by a name, built from the layers."""

from nnkit.models.convolutional import cnn, lenet
from nnkit.models.language import lstm_lm, transformer_lm
from nnkit.models.named import MODELS, build
from nnkit.models.perceptron import mlp, mlp_bn_dropout
from nnkit.models.residual import resnet, resnet18, resnet20, resnet50

__all__ = [
    "MODELS",
    "build",
    "cnn",
    "lenet",
    "lstm_lm",
    "mlp",
    "mlp_bn_dropout",
    "resnet",
    "resnet18",
    "resnet20",
    "resnet50",
    "transformer_lm",
]
