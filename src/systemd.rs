//! Notifications to systemd (`Type=notify`, `WatchdogSec=`): the program is ready, it reloads, it is alive. Elsewhere there is no
//! `NOTIFY_SOCKET`, and nothing is sent.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use sd_notify::NotifyState;

use crate::balena::Failure;
use crate::discovery::{HELD_BACK, Published};
use crate::liveness::Liveness;
use crate::net::{NoThread, threads};

/// The program has started: its settings are valid and its sockets are open.
pub fn ready() {
    notify(&[NotifyState::Ready]);
}

/// A signal asked for a refresh. [`refreshed`] announces its end.
pub fn reloading() {
    // sd-notify's own monotonic_usec_now() overflows on processors of 32 bits, 36 minutes after they start.
    let now = clock_gettime(ClockId::Monotonic);
    let micros = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1_000;
    notify(&[NotifyState::Reloading, NotifyState::MonotonicUsec(micros)]);
}

/// How often to reset the watchdog; none if there is no watchdog.
pub fn watchdog_interval() -> Option<Duration> {
    // systemd recommends half of the time that it waits.
    sd_notify::watchdog_enabled().map(|longest| longest / 2)
}

/// Resets the watchdog: the program is alive.
pub fn alive() {
    notify(&[NotifyState::Watchdog]);
}

/// Resets the watchdog, if there is one, while the loop is on time. Otherwise systemd kills the program and starts it again.
///
/// # Errors
/// The thread cannot be started. The loop itself sleeps for as long as `--refresh` says.
pub fn watch(liveness: Arc<Liveness>) -> Result<(), NoThread> {
    let Some(interval) = watchdog_interval() else { return Ok(()) };
    let run = move || {
        loop {
            if liveness.overdue().is_none() {
                alive();
            }
            thread::sleep(interval);
        }
    };
    threads::spawn("watchdog", run)
}

/// Reports the outcome of a refresh.
pub fn refreshed(outcome: &Result<Published, Failure>) {
    let status = match outcome {
        Ok(Published::Written | Published::Unchanged) => "the last refresh succeeded".to_owned(),
        Ok(Published::HeldBack) => HELD_BACK.to_owned(),
        // A line break would end the text, and what follows would be another assignment.
        Err(failure) => format!("the last refresh failed: {}", failure.to_string().replace(['\n', '\r'], " ")),
    };
    // After a reload, `READY=1` announces its end. At other times it changes nothing.
    notify(&[NotifyState::Ready, NotifyState::Status(&status)]);
}

/// The service manager decides what a missing notification means, so a failure is no more than a line in the log.
fn notify(states: &[NotifyState]) {
    if let Err(error) = send(states) {
        log::debug!("cannot notify systemd: {error}");
    }
}

#[cfg(target_os = "linux")]
fn send(states: &[NotifyState]) -> io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    let path = std::env::var_os("NOTIFY_SOCKET").unwrap_or_default();
    // sd-notify takes this for the name of a file. It is a name in the abstract namespace.
    let Some(name) = path.as_bytes().strip_prefix(b"@") else { return sd_notify::notify(states) };
    let message = states.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n");
    let address = SocketAddr::from_abstract_name(name)?;
    UnixDatagram::unbound()?.send_to_addr(message.as_bytes(), &address).map(|_| ())
}

#[cfg(not(target_os = "linux"))]
fn send(states: &[NotifyState]) -> io::Result<()> {
    sd_notify::notify(states)
}
