"""The batches of a training: their order, reading, decoding, augmentation and transfer to the device."""
