"""Are the promises about resume, splits, packing, export and saves kept on this machine?"""
