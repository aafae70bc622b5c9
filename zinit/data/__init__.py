"""Examples from files and the Hub: records, images, packing, crops, splits."""
