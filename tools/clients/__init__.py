"""Objects of other libraries, trained, saved, killed and resumed: which of them go on bit for bit. `make clients`"""
