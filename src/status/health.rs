//! `baletheus health`: for a container's HEALTHCHECK, where there is no curl.

use std::ffi::OsString;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, Command};
use reqwest::blocking::Client;
use reqwest::redirect::Policy;

/// A health check that takes longer has failed.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Its command line.
pub fn command() -> Command {
    Command::new("health")
        .about("Asks a running sidecar whether it is healthy: exit code 0 if so, for a container's HEALTHCHECK")
        .arg(Arg::new("url").value_name("URL").help("of its status endpoint [default: from LISTEN_ADDRESS]"))
}

/// Asks the sidecar at this URL, or at the address where one with this environment listens.
pub fn ask(url: Option<String>, listen: Option<OsString>) -> ExitCode {
    let listen = listen.and_then(|listen| listen.into_string().ok()).filter(|listen| !listen.is_empty());
    let Some(url) = url.or_else(|| listen.map(|listen| base(&listen))) else {
        eprintln!("baletheus: no URL is given, and LISTEN_ADDRESS is not set");
        return ExitCode::from(2);
    };
    match healthy(&format!("{}/-/healthy", url.trim_end_matches('/'))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("baletheus: {error}");
            ExitCode::FAILURE
        }
    }
}

/// `:9797` and `0.0.0.0:9797` are all addresses, and one of them is this machine's own.
fn base(listen: &str) -> String {
    let port = listen.rsplit(':').next().unwrap_or_default();
    let everywhere = ["", "0.0.0.0", "[::]"].iter().any(|all| *listen == format!("{all}:{port}"));
    if everywhere { format!("http://localhost:{port}") } else { format!("http://{listen}") }
}

fn healthy(url: &str) -> Result<(), String> {
    let _ = rustls::crypto::ring::default_provider().install_default(); // an error: it is there already
    let client = Client::builder().no_proxy().timeout(TIMEOUT).redirect(Policy::none()).build();
    let answer = client.and_then(|client| client.get(url).send());
    let answer = answer.map_err(|error| format!("{url} does not answer: {}", error.without_url()))?;
    let status = answer.status();
    if status.is_success() {
        Ok(())
    } else {
        Err(format!("{url} answers {status}: {}", answer.text().unwrap_or_default()))
    }
}
