//! Executes plans on devices.
//!
//! | module | what it is |
//! |---|---|
//! | [`device`] | a device: arena, threads, prepared steps |
//! | [`arena`] | a device's memory, which peers on its host may look at |
//! | [`group`] | the devices of one process, and the threads that drive them |
//! | [`kernels`] | the CPU backend |
//! | [`recorder`] | what a device did last: its flight recorder |
//! | [`watch`] | which step first writes values that are not finite |
//! | [`collective`] | exchanges and all-reduces, over any transport |
//! | [`transport`] | how bytes move between devices |
//! | [`pool`] | a device's threads |
//! | [`wire`] | programs and arrays as messages |
//! | [`store`] | where checkpoints lie: a folder or an object store |
//! | [`checkpoint`] | a checkpoint's format, and a worker's part in writing and reading it |
//! | [`service`] | the service by which a coordinator drives a worker's devices |
//! | [`node`] | a worker's life: joining a coordinator, beats, leaving |
//! | [`tls`] | mutual TLS by role |
//! | [`access`] | which role may call which method |
//! | [`cli`] | a worker's command line |
//! | [`config`](mod@config) | options from a file |
//! | [`data`] | readers and writers of volumes |

pub mod access;
pub mod arena;
pub mod checkpoint;
pub mod cli;
pub mod collective;
pub mod config;
pub mod data;
pub mod device;
pub mod group;
pub mod kernels;
pub mod node;
pub mod pool;
pub mod recorder;
pub mod service;
pub mod store;
pub mod tls;
pub mod transport;
pub mod watch;
pub mod wire;
