"""A command of nnU-Net whose trainer stops after three iterations: python brief_nnunet.py nnUNetv2_train ARGUMENTS."""

import sys
from functools import wraps
from importlib.metadata import entry_points

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

construct = nnUNetTrainer.__init__


@wraps(construct)  # nnU-Net reads the signature
def construct_brief(self, *args, **settings):
    construct(self, *args, **settings)
    self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 3, 1
    self.initial_lr = 1e-4


if __name__ == "__main__":
    nnUNetTrainer.__init__ = construct_brief
    [script] = (script for script in entry_points(group="console_scripts") if script.name == sys.argv[1])
    sys.argv = sys.argv[1:]
    sys.exit(script.load()())
