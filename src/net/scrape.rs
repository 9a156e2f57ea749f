//! What the tunnel and `check` share of a scrape: where it may go, and why an exchange fails.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::net::refused::{Reason, Refused};

/// The time-out for reaching a device, where the scrape names none: below Prometheus' default of 10 s, so that there is
/// time to answer with the reason. balena's VPN proxy answers only after 134 s if a device swallows packets.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(9);
/// SSH of the host OS, which the API key opens as well.
const SSH_PORT: u64 = 22222;

/// Decides whether a scrape may connect to `host:port`: it has to be a target, and never SSH of the host OS.
pub fn check_destination(host_port: &str, is_target: bool) -> Result<(), Refused> {
    let refuse = |why: String| Err(Refused::new(Reason::NotTarget, format!("refused: {why}")));
    let port = host_port.rsplit(':').next().and_then(|port| port.parse().ok());
    if port == Some(SSH_PORT) {
        return refuse("port 22222 is the SSH of the host".into());
    }
    if !is_target {
        return refuse(format!("{host_port} is no target in the target file"));
    }
    Ok(())
}

/// Why an exchange over a connection failed.
pub fn broken(error: &hyper::Error) -> Refused {
    if error.is_parse() {
        Refused::new(Reason::NotHttp, format!("not HTTP: {error}"))
    } else {
        Refused::new(Reason::BrokeOff, format!("broke off: {error}"))
    }
}

/// When an answer has to be complete.
#[derive(Clone, Copy)]
pub struct Deadline {
    timeout: Duration,
    /// The moment at which the time-out ends.
    pub at: Instant,
}

impl Deadline {
    /// The end of a time-out that starts now.
    pub fn after(timeout: Duration) -> Self {
        Deadline { timeout, at: Instant::now() + timeout }
    }

    /// Waits for an answer until the deadline.
    pub async fn wait<T>(self, answer: impl Future<Output = T>) -> Result<T, Refused> {
        let late = |_| Refused::new(Reason::Timeout, format!("no answer in {} s", self.timeout.as_secs_f64()));
        timeout_at(self.at, answer).await.map_err(late)
    }
}
