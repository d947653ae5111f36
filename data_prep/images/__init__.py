"""Images: the content-addressed store, decoding, augmentation."""
