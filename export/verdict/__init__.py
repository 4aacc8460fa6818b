"""Is INT8 as good, which layer is to blame, and what can be done about it?"""
