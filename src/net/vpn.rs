//! balena's VPN proxy, an HTTP `CONNECT` proxy: the way to any port of any device that the API key may reach.
//!
//! What the comments say about the proxy was recorded from open-balena-vpn 12.3.105 (`tests/recordings/vpn`).

use base64::prelude::{BASE64_STANDARD, Engine};
use hyper::Uri;

use crate::key_renewal::KeySource;
use crate::net::connector::{Connector, Stream, is_untrusted, trust_hint};
use crate::net::http_connect::connect;
use crate::net::scrape_client::Deadline;
use crate::net::scrape_error::{ScrapeError, ScrapeReason};
use crate::net::threads::blocking;
use crate::secret::Secret;

/// Opens connections through the proxy, to `<uuid>.balena:<port>`.
///
/// - The proxy checks access at `CONNECT` only. A tunnel may idle (320 s tried) and take several requests; a tunnel whose
///   request timed out must not be used again.
/// - A half-closed connection (`SHUT_WR`) ends the tunnel and loses the answer.
/// - After an error answer the proxy only half-closes, so the connection is dropped here.
pub struct Vpn {
    connector: Connector,
    url: Uri,
    keys: KeySource,
}

impl Vpn {
    pub fn new(connector: Connector, url: Uri, keys: KeySource) -> Self {
        Vpn { connector, url, keys }
    }

    /// Opens a tunnel to `<uuid>.balena:<port>`. A key that is refused is read again from its file.
    pub async fn open(&self, authority: &str, deadline: Deadline) -> Result<Stream, ScrapeError> {
        let key = self.keys.current();
        let refused = match self.ask(authority, &key, deadline).await {
            Err(refused) if refused.status == Some(407) => refused,
            answer => return answer,
        };
        let keys = self.keys.clone();
        match blocking("key", move || keys.renew(&key)).await {
            Ok(Ok(key)) => self.ask(authority, &key, deadline).await,
            Ok(Err(Some(trouble))) => {
                Err(ScrapeError { message: format!("{}; {trouble}", refused.message), ..refused })
            }
            _ => Err(refused),
        }
    }

    async fn ask(&self, authority: &str, key: &Secret, deadline: Deadline) -> Result<Stream, ScrapeError> {
        let unreachable = |refused: ScrapeError| {
            ScrapeError::new(ScrapeReason::NoTunnel, format!("tunnel host not reachable: {}", refused.message))
        };
        let mut stream =
            deadline.wait(self.connector.open(&self.url, deadline)).await.flatten().map_err(unreachable)?;
        // the proxy ignores the name of the user; it does not know the scheme in lower case
        let user = format!("Basic {}", BASE64_STANDARD.encode(format!("baletheus:{}", key.reveal())));
        match deadline.wait(connect(&mut stream, authority, Some(&user))).await? {
            Ok(200) => Ok(stream),
            Ok(status) => Err(refusal(status, authority)),
            Err(error) => Err(ScrapeError::new(ScrapeReason::BadTunnel, format!("the tunnel host {error}"))),
        }
    }
}

/// What to do about a tunnel host that cannot be reached.
pub fn unreachable_hint(refused: &ScrapeError) -> &'static str {
    if is_untrusted(&refused.message) {
        trust_hint(&refused.message)
    } else {
        "is --tunnel-url (TUNNEL_URL) right, and may this machine reach it?"
    }
}

/// What a status of the proxy means.
fn refusal(status: u16, authority: &str) -> ScrapeError {
    let (reason, message) = match status {
        // one status for three causes, of which the last passes by itself
        407 => (ScrapeReason::NoAccess, "refused: no access, unknown device, or balena's API busy".into()),
        503 => (ScrapeReason::NotConnected, "device not connected to the VPN".into()),
        500 => {
            let port = authority.rsplit(':').next().unwrap_or_default();
            (ScrapeReason::PortClosed, format!("port {port} closed or device unreachable"))
        }
        403 => (ScrapeReason::NoDevice, "refused: not the name of a device".into()),
        _ => (ScrapeReason::BadTunnel, "the tunnel host is no VPN proxy of balena's".into()),
    };
    ScrapeError { status: Some(status), ..ScrapeError::new(reason, message) }
}
