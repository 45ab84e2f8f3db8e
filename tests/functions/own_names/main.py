import msgpack
import pool
import runtime

import dayfly
import protocol


def handler(event, context):
    return [module.WHOSE for module in (msgpack, pool, runtime, dayfly, protocol)]
