//! Why the program cannot start.

use std::io;
use std::net::SocketAddr;

use thiserror::Error;

use crate::net::threads::NoThread;

impl CannotStart {
    /// Whether another start may succeed without a change: an address may come, and a port or a thread may become free.
    pub fn may_pass(&self) -> bool {
        match self {
            CannotStart::Thread(refused) => refused.may_pass(),
            CannotStart::Listen { error, .. } => error.kind() != io::ErrorKind::PermissionDenied,
            CannotStart::Signals(_) | CannotStart::Io(_) => true,
            CannotStart::Tls(_) | CannotStart::Metrics(_) => false,
        }
    }
}

/// What the system or the environment does not allow.
#[derive(Debug, Error)]
pub enum CannotStart {
    #[error(transparent)]
    Thread(#[from] NoThread),
    /// TLS cannot be used. The text says what to do.
    #[error("{0}")]
    Tls(String),
    #[error("cannot listen on {addresses:?}: {error}; set another --listen ({variable})")]
    Listen {
        addresses: Vec<SocketAddr>,
        variable: &'static str,
        /// What the system says about the last one.
        error: io::Error,
    },
    #[error("cannot handle signals: {0}")]
    Signals(io::Error),
    /// The metrics contradict each other: a mistake in the program.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The system refuses what an event loop needs.
    #[error(transparent)]
    Io(#[from] io::Error),
}
