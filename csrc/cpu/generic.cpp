#include "../args.h"
#include "standard.h"

#define PA_NAME generic
#define PA_TEXT "generic"
#define PA_LANES 4
#define PA_ROWS 3
#include "kernels.h"
