//! Who may ask the status endpoint, or the tunnel for its own pages: the name in `Host`, and the token if one is set.
//! And the headers that keep a browser from using an answer for anything else.

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use base64::prelude::{BASE64_STANDARD, Engine};
use hyper::header::{AUTHORIZATION, HOST, HeaderMap, HeaderName, HeaderValue, WWW_AUTHENTICATE};
use hyper::http::uri::Authority;
use hyper::{Request, Response, StatusCode};
use parking_lot::Mutex;
use subtle::ConstantTimeEq;

use crate::secret::{self, BadSecret, Secret};

/// The page has one style sheet and no scripts. Nothing may frame it, and it has no form.
const POLICY: &str =
    "default-src 'none'; style-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Headers of every answer.
const HEADERS: [(&str, &str); 4] = [
    ("x-content-type-options", "nosniff"),
    ("content-security-policy", POLICY),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
];

/// The entry of [`Guard::hosts`] that allows every name.
pub const ANY_HOST: &str = "*";

/// The shortest token, in characters: shorter ones can be guessed.
const MIN_TOKEN_LENGTH: usize = 16;

#[derive(Clone, Debug, Default)]
pub struct Guard {
    /// Names with a dot by which the endpoint may be asked, in lower case.
    pub hosts: Vec<String>,
    /// What a client has to send, if anything.
    pub token: Option<Token>,
}

/// A token, and its file, which is read again at each request: a token that is replaced is worth nothing any more.
#[derive(Clone, Debug)]
pub struct Token {
    file: PathBuf,
    last: Arc<Mutex<LastToken>>,
}

#[derive(Debug)]
struct LastToken {
    token: Secret,
    /// Whether the log has said that the file holds no token any more.
    is_stale: bool,
}

impl Token {
    /// Reads a token.
    ///
    /// # Errors
    /// The file cannot be read, or it holds none.
    pub fn read(file: PathBuf) -> Result<Self, BadSecret> {
        let last = LastToken { token: token(&secret::text(&file)?)?, is_stale: false };
        Ok(Token { file, last: Arc::new(Mutex::new(last)) })
    }

    /// The token of now: that of the file, or the last one while the file holds none.
    fn current(&self) -> Secret {
        let mut last = self.last.lock();
        match secret::text_again(&self.file).and_then(|text| token(&text)) {
            Ok(token) => *last = LastToken { token, is_stale: false },
            Err(BadSecret::NoFile) => {}
            Err(why) if !last.is_stale => {
                last.is_stale = true;
                log::warn!("the token file {} {why}, so the old token stays", self.file.display());
            }
            Err(_) => {}
        }
        last.token.clone()
    }
}

fn token(text: &str) -> Result<Secret, BadSecret> {
    let token = Secret::new(text)?;
    let is_long = token.reveal().len() >= MIN_TOKEN_LENGTH;
    is_long.then_some(token).ok_or(BadSecret::Short(MIN_TOKEN_LENGTH))
}

/// The status and the text for a request that is refused.
type Refusal = (StatusCode, &'static str);

/// The request is for a name that is not ours: the page of another site may have asked, by DNS rebinding.
const UNKNOWN_HOST: Refusal = (
    StatusCode::FORBIDDEN,
    "baletheus does not know the host name of this request; add it to --status-host (STATUS_HOSTS)\n",
);

const NO_TOKEN: Refusal = (
    StatusCode::UNAUTHORIZED,
    "the token is missing or wrong: send that of --status-token-file (STATUS_TOKEN_FILE) as a bearer token, or as the password \
     of any user\n",
);

impl Guard {
    /// Judges a request. Health needs no token: it says nothing about the fleet, and a health check has none.
    ///
    /// # Errors
    /// The request is to be refused.
    pub fn check<B>(&self, request: &Request<B>) -> Result<(), Refusal> {
        let hosts = request.headers().get_all(HOST).iter().map(|host| host.to_str().ok());
        let target = request.uri().authority().map(|authority| Some(authority.as_str()));
        if !hosts.chain(target).all(|host| host.is_some_and(|host| self.knows(host))) {
            return Err(UNKNOWN_HOST);
        }
        let is_open = request.uri().path() == "/-/healthy";
        if is_open || self.token.as_ref().is_none_or(|token| has_token(request.headers(), &token.current())) {
            Ok(())
        } else {
            Err(NO_TOKEN)
        }
    }

    /// No name without a dot and no address belongs to another site. A name with a dot has to be configured.
    fn knows(&self, host: &str) -> bool {
        let Ok(authority) = host.parse::<Authority>() else { return false };
        let name = authority.host();
        // A user before it or text between an address in brackets and the port is no host name.
        if !host.strip_prefix(name).is_some_and(|port| port.is_empty() || port.starts_with(':')) {
            return false;
        }
        let name = name.to_ascii_lowercase();
        let name = name.strip_suffix('.').unwrap_or(&name);
        let is_address = name.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
        let is_local = !name.contains('.') || name.ends_with(".localhost");
        is_address || is_local || self.hosts.iter().any(|known| known == name || known == ANY_HOST)
    }
}

/// `Bearer TOKEN`, as Prometheus sends it, or `Basic`, as a browser does, with any user.
fn has_token(headers: &HeaderMap, token: &Secret) -> bool {
    let Some((scheme, sent)) = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok()?.split_once(' ')) else {
        return false;
    };
    let sent = sent.trim();
    let sent = if scheme.eq_ignore_ascii_case("bearer") {
        sent.as_bytes().to_vec()
    } else if scheme.eq_ignore_ascii_case("basic") {
        let decoded = BASE64_STANDARD.decode(sent).unwrap_or_default();
        let password = decoded.iter().position(|byte| *byte == b':').map(|colon| &decoded[colon + 1..]);
        password.unwrap_or_default().to_vec()
    } else {
        return false;
    };
    sent.ct_eq(token.reveal().as_bytes()).into()
}

/// Adds the headers that every answer has.
pub fn protect<B>(answer: &mut Response<B>) {
    for (name, value) in HEADERS {
        answer.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    if answer.status() == StatusCode::UNAUTHORIZED {
        let ask = HeaderValue::from_static("Basic realm=\"baletheus\", charset=\"UTF-8\"");
        answer.headers_mut().insert(WWW_AUTHENTICATE, ask);
    }
}
