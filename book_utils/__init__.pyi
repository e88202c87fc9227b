from .corruption import corrupt
from .data import DATA_ROOT, mnist_root, mnist_tensors, random_batches
from .device import get_device, set_seed
from .environment import Check, check_environment
from .metrics import (
    ButterflyJudge,
    DigitClassifier,
    attribute_labels,
    butterfly_judge,
    digit_classifier,
    frechet_distance,
)
from .models import MODELS_ROOT, load_weights, resolve
from .pictures import grid_image, plot_losses, show_rows, use_book_style
from .slider import Slider
from .training import History, epoch_means, fit
from .unet import BasicUNet, ClassConditionedUnet
from .worlds.butterflies import (
    Butterfly,
    butterfly_dataset,
    butterfly_images,
    caption,
    export_imagefolder,
    random_butterflies,
    random_butterfly,
    render_butterfly,
)
from .worlds.captions import random_attributes, random_caption
