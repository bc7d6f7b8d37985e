"""The whole story on one machine: an object store, real input, two data sets, two small models; `tiercache demo`."""
