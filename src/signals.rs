//! The one place that knows signals: SIGTERM and SIGINT stop a program, SIGHUP reloads it, SIGXFSZ is a failed write.

use std::process;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
use signal_hook::flag;
use signal_hook::iterator::Signals;
use signal_hook::low_level::signal_name;

use crate::net::{CannotStart, threads};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// SIGTERM or SIGINT: end.
    Stop,
    /// SIGHUP: refresh now.
    Reload,
}

/// Takes a SIGHUP that comes while the program starts: all is read then anyway, and the signal would end the program.
pub fn outlive_hangup() {
    let _ = flag::register(SIGHUP, Arc::default()); // an error: the signal ends the program as before
}

/// Handles signals from now on, on a separate thread, so that no request delays them. `notify` gets each event and must not
/// block. After a stop the program has `grace` to end by itself; then the process exits with `code`.
///
/// # Errors
/// The system refuses the handlers or the thread.
pub fn handle(grace: Duration, code: i32, notify: impl Fn(Event) + Send + 'static) -> Result<(), CannotStart> {
    // SIGXFSZ has a handler so that a write beyond the limit of file sizes fails and does not kill the process.
    let mut signals = Signals::new([SIGTERM, SIGINT, SIGHUP, SIGXFSZ]).map_err(CannotStart::Signals)?;
    let run = move || {
        for signal in signals.forever() {
            match signal {
                SIGHUP => notify(Event::Reload),
                SIGTERM | SIGINT => {
                    log::info!("stopped by {}", signal_name(signal).unwrap_or("a signal"));
                    notify(Event::Stop);
                    log::logger().flush();
                    thread::sleep(grace);
                    process::exit(code);
                }
                _ => {}
            }
        }
    };
    Ok(threads::spawn("signals", run)?)
}
