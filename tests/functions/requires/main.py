import sys

LOADED_BEFORE = "six" in sys.modules

import six


def handler(event, context):
    return {"six": six.__version__, "file": six.__file__, "before": LOADED_BEFORE}
