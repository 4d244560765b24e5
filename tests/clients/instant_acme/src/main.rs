//! instant-acme at work: URL ROOT DIRECTORY order CHAIN NAME... | URL ROOT DIRECTORY revoke CHAIN REASON
//!
//! ROOT is the certificate that the ACME server's TLS is trusted by; the account stays in DIRECTORY.

use std::error::Error;
use std::fs;
use std::path::Path;
use std::time::Duration;

use instant_acme::{
    Account, AuthorizationStatus, Identifier, NewAccount, NewOrder, RetryPolicy, RevocationReason,
    RevocationRequest,
};

const PATIENCE: RetryPolicy = RetryPolicy::new().timeout(Duration::from_secs(100));

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, root, directory, action, chain, rest @ ..] = arguments.as_slice() else {
        return Err("URL ROOT DIRECTORY ACTION CHAIN ...".into());
    };
    let account = account(url, root, &Path::new(directory).join("account.json")).await?;
    match action.as_str() {
        "order" => fs::write(chain, order(&account, rest).await?)?,
        "revoke" => revoke(&account, &fs::read_to_string(chain)?, &rest[0]).await?,
        _ => return Err("order or revoke?".into()),
    }
    Ok(())
}

async fn account(url: &str, root: &str, kept: &Path) -> Result<Account, Box<dyn Error>> {
    let builder = Account::builder_with_root(root)?;
    if kept.exists() {
        return Ok(builder.from_credentials(serde_json::from_str(&fs::read_to_string(kept)?)?).await?);
    }
    let new = NewAccount {
        contact: &["mailto:admin@example.com"],
        terms_of_service_agreed: true,
        only_return_existing: false,
    };
    let (account, credentials) = builder.create(&new, url.to_owned(), None).await?;
    fs::write(kept, serde_json::to_string(&credentials)?)?;
    Ok(account)
}

async fn order(account: &Account, names: &[String]) -> Result<String, Box<dyn Error>> {
    let identifiers: Vec<Identifier> = names
        .iter()
        .map(|name| name.parse().map_or_else(|_| Identifier::Dns(name.clone()), Identifier::Ip))
        .collect();
    let mut order = account.new_order(&NewOrder::new(&identifiers)).await?;
    let mut authorizations = order.authorizations();
    while let Some(authorization) = authorizations.next().await {
        let mut authorization = authorization?;
        if authorization.status == AuthorizationStatus::Pending {
            let kind = authorization.challenges.first().ok_or("no challenge")?.r#type.clone();
            let mut challenge = authorization.challenge(kind).ok_or("no such challenge")?;
            challenge.set_ready().await?;
        }
    }
    order.poll_ready(&PATIENCE).await?;
    order.finalize().await?;
    Ok(order.poll_certificate(&PATIENCE).await?)
}

async fn revoke(account: &Account, chain: &str, reason: &str) -> Result<(), Box<dyn Error>> {
    let leaf = pem(chain)?;
    let reason = match reason {
        "keyCompromise" => RevocationReason::KeyCompromise,
        "superseded" => RevocationReason::Superseded,
        _ => return Err("which reason?".into()),
    };
    let request = RevocationRequest { certificate: &leaf.into(), reason: Some(reason) };
    Ok(account.revoke(&request).await?)
}

/// The first certificate of a chain, as DER.
fn pem(chain: &str) -> Result<Vec<u8>, Box<dyn Error>> {
    const ALPHABET: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut der, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for letter in chain.split("-----").nth(2).ok_or("no PEM")?.chars() {
        if let Some(value) = ALPHABET.find(letter) {
            bits = (bits << 6) | value as u32;
            count += 6;
            if count >= 8 {
                count -= 8;
                der.push((bits >> count) as u8);
            }
        }
    }
    Ok(der)
}
