from .corruption import corrupt
from .data import DATA_ROOT, mnist_root, mnist_tensors, random_batches
from .device import get_device, set_seed
from .environment import Check, check_environment
from .guidance import (
    angle_loss,
    color_loss,
    color_number,
    guided_sample,
    loss_gradient,
    predicted_x0,
    random_cutouts,
    sample_classes,
    unseen_words,
)
from .images import image_files, image_folder, open_rgb
from .metrics import (
    ButterflyJudge,
    DigitClassifier,
    FamilyJudge,
    attribute_labels,
    butterfly_judge,
    digit_classifier,
    family_judge,
    fish_labels,
    frechet_distance,
)
from .models import MODELS_ROOT, add_difference, load_weights, require_hub, resolve, weight_difference
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
from .worlds.fish import Fish, fish_caption, fish_dataset, fish_images, random_fish, random_fishes, render_fish
