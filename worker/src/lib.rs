//! Executes plans on devices.
//!
//! | module | what it is |
//! |---|---|
//! | [`device`] | a device: arena, threads, prepared steps |
//! | [`embedded`] | the devices of a mesh inside one process |
//! | [`kernels`] | the CPU backend |
//! | [`collective`] | exchanges and all-reduces, over any transport |
//! | [`transport`] | how bytes move between devices |
//! | [`pool`] | a device's threads |
//! | [`data`] | readers and writers of volumes |

pub mod collective;
pub mod data;
pub mod device;
pub mod embedded;
pub mod kernels;
pub mod pool;
pub mod transport;
