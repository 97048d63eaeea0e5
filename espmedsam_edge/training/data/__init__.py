"""Images and masks for training: public layouts, checks, lists, the dataset, augmentation, loading."""
