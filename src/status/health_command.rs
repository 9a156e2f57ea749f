//! The command `baletheus health`: asks a running sidecar whether it is healthy.

use std::io::Read;
use std::time::Duration;

use reqwest::blocking::Client;
use reqwest::redirect::Policy;
use reqwest::{StatusCode, Url};
use thiserror::Error;

use crate::net::{CannotStart, no_client};
use crate::text::{causes, printable};

/// The limit for a whole answer to a health check.
const HEALTH_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of an answer that the message shows.
const EXCERPT_SIZE: u64 = 200;

/// `baletheus health`: asks the status endpoint at this URL, or at the address where a sidecar with this environment listens. For
/// a container's HEALTHCHECK, where there is no curl.
pub fn ask(url: Option<&str>, listen: Option<&str>) -> Result<(), Unhealthy> {
    let listen = listen.map(str::trim).filter(|listen| !listen.is_empty());
    let Some(place) = url.map(str::trim).or(listen).filter(|place| !place.is_empty()) else {
        return Err(Unhealthy::NoUrl);
    };
    let url = if place.contains("://") { place.to_owned() } else { base(place) };
    if !is_plain(&url) {
        return Err(Unhealthy::BadUrl);
    }
    healthy(format!("{}/-/healthy", url.trim_end_matches('/')))
}

/// Whether this is a URL that messages may show: a password or a query would be a secret.
fn is_plain(url: &str) -> bool {
    let Ok(url) = Url::parse(url) else { return false };
    let has_user = !url.username().is_empty() || url.password().is_some();
    matches!(url.scheme(), "http" | "https") && !has_user && url.query().is_none() && url.fragment().is_none()
}

/// Why nobody says that the sidecar is healthy.
#[derive(Debug, Error)]
pub enum Unhealthy {
    #[error("no URL is given, and LISTEN_ADDRESS is not set: set one of them")]
    NoUrl,
    #[error("this is no URL such as http://127.0.0.1:9797, without a password and a query")]
    BadUrl,
    #[error(transparent)]
    CannotStart(#[from] CannotStart),
    #[error("{url} does not answer: {cause}; does baletheus run, and listen there (--listen, LISTEN_ADDRESS)?")]
    NoAnswer { url: String, cause: String },
    #[error("{url} answers {status}: {excerpt}")]
    Answer { url: String, status: StatusCode, excerpt: String },
}

/// `:9797` and `0.0.0.0:9797` are all addresses of this machine. `localhost` may not resolve in a container.
fn base(listen: &str) -> String {
    let port = listen.rsplit(':').next().unwrap_or_default();
    let everywhere = ["", "0.0.0.0", "[::]"].iter().any(|all| *listen == format!("{all}:{port}"));
    if everywhere { format!("http://127.0.0.1:{port}") } else { format!("http://{listen}") }
}

fn healthy(url: String) -> Result<(), Unhealthy> {
    let _ = rustls::crypto::ring::default_provider().install_default(); // an error: it is installed already
    let client = Client::builder().no_proxy().redirect(Policy::none()).build();
    let client = client.map_err(|error| no_client(&error))?;
    // The time-out of a request, unlike the client's, bounds the whole answer and not each read of it.
    let answer = client.get(&url).timeout(HEALTH_TIMEOUT).send().map_err(|error| {
        let error = error.without_url();
        let cause = causes(&error).last().map(ToString::to_string).unwrap_or_default();
        Unhealthy::NoAnswer { url: url.clone(), cause }
    })?;
    let status = answer.status();
    if status.is_success() {
        return Ok(());
    }
    let mut excerpt = Vec::new();
    let _ = answer.take(EXCERPT_SIZE).read_to_end(&mut excerpt); // the status says enough without it
    let excerpt = printable(String::from_utf8_lossy(&excerpt).trim());
    Err(Unhealthy::Answer { url, status, excerpt })
}
