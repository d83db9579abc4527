// The code stands behind #, which browsers send to nobody. It is taken out of the address bar before it is used.
"use strict";
const code = location.hash.slice(1);
if (code) {
  history.replaceState(null, "", location.pathname);
  document.getElementById("code").value = code;
  document.getElementById("enter-form").submit();
}
