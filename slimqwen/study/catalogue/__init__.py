"""The studies: which variations of one recipe each compares, and what the paper says of them (method.md's tables).

`rotation` is the one without a table in the paper: it is about what slimqwen does beyond it.
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
