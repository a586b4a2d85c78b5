"""The method, in plain torch: model, transformations, objectives and SIGReg."""
