"""Is this audio fit to calibrate with?"""
