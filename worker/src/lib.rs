//! Executes plans on devices.
//!
//! | module | what it is |
//! |---|---|
//! | [`device`] | a device: arena, threads, prepared steps |
//! | [`group`] | the devices of one process, and the threads that drive them |
//! | [`kernels`] | the CPU backend |
//! | [`collective`] | exchanges and all-reduces, over any transport |
//! | [`transport`] | how bytes move between devices |
//! | [`pool`] | a device's threads |
//! | [`data`] | readers and writers of volumes |

pub mod collective;
pub mod data;
pub mod device;
pub mod group;
pub mod kernels;
pub mod pool;
pub mod transport;
