//! Being asked to stop: SIGTERM and SIGINT.

use signal_hook::consts::{SIGINT, SIGTERM};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

static ASKED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From now on the first SIGTERM or SIGINT only raises a flag, for [`asked`]; a second one ends the process with
/// `exit_code`.
///
/// # Errors
/// A system that lets nobody listen.
pub fn listen(exit_code: u8) -> io::Result<()> {
    let asked = ASKED.get_or_init(Arc::default);
    for signal in [SIGTERM, SIGINT] {
        // The order matters: the first signal finds the flag down.
        signal_hook::flag::register_conditional_shutdown(signal, i32::from(exit_code), asked.clone())?;
        signal_hook::flag::register(signal, asked.clone())?;
    }
    Ok(())
}

/// Whether this process was asked to stop.
pub fn asked() -> bool {
    ASKED.get().is_some_and(|a| a.load(Ordering::Relaxed))
}

/// Waits until this process is asked to stop.
pub(crate) async fn wait() {
    while !asked() {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}
