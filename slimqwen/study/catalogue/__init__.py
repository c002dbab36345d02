"""The studies: the variations of one recipe that each compares, and the paper's numbers for them (docs/method.md).

`rotation` and `width` have no table in the paper: they measure what slimqwen does beyond it.
"""

from slimqwen.study.catalogue.depth import DEPTH
from slimqwen.study.catalogue.experts import EXPERTS
from slimqwen.study.catalogue.init import INIT
from slimqwen.study.catalogue.losses import LOSSES
from slimqwen.study.catalogue.mtp import MTP
from slimqwen.study.catalogue.rotation import ROTATION
from slimqwen.study.catalogue.schedules import SCHEDULES
from slimqwen.study.catalogue.width import WIDTH

STUDIES = {study.name: study for study in (INIT, EXPERTS, LOSSES, MTP, SCHEDULES, DEPTH, WIDTH, ROTATION)}
