//! The wire protocol between coordinator, workers and clients.
